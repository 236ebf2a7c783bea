"""The tasks of lm-evaluation-harness on documents of this machine: all but these is the harness's."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

from lm_eval.tasks import TaskManager

from ..errors import RiverError
from .documents import documents_of

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@cache
def task_manager() -> TaskManager:
    """Reading the index of all tasks takes seconds."""
    return TaskManager()


def check(name: str, data: Path | None) -> None:
    """Refuses a task that the harness does not know, or documents that are missing, before anything runs."""
    manager = task_manager()
    if data is not None:
        task_files(manager, name, data)
    elif name not in manager.task_index and not Path(name).is_file():
        raise RiverError(
            f"task {name[:80]!r} is unknown; accepted: a task, group or tag of lm-evaluation-harness, as "
            "`lm-eval ls tasks` lists them, or the YAML file of a task"
        )


@contextmanager
def with_documents(manager: TaskManager, name: str, data: Path | None) -> Iterator[None]:
    """Within it a task, or every task of a group or tag, has its documents from a folder, if there is one.

    The index then names a file for each of the tasks, which includes the harness's own.
    """
    if data is None:
        yield
        return
    index, files = manager.task_index, task_files(manager, name, data)
    entries = {task: index[task] for task in files}
    with tempfile.TemporaryDirectory() as folder:
        for task, entry in entries.items():
            path = Path(folder, f"{task}.yaml")
            path.write_text(json.dumps(_changed(entry.yaml_path, task, files[task], folder)))
            index[task] = replace(entry, yaml_path=path)
        try:
            yield
        finally:
            index.update(entries)


def _changed(own: Path, task: str, files: dict[str, str], cache_dir: str) -> dict:
    return {
        "include": str(own),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "custom_dataset": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": cache_dir},
    }


def tasks_of(
    manager: TaskManager, name: str, changes: Mapping = MappingProxyType({})
) -> list[tuple[str, dict]]:
    """A task's name and config; of a group or a tag those of its tasks, and of the groups in it.

    Args:
        changes: what the groups around it say in place of its own config.
    """
    entry = manager.task_index.get(name)
    match entry.kind.name if entry else None:
        case "TASK":
            return [(name, {**entry.cfg, **changes})]
        case "TAG":
            members = [{"task": task} for task in sorted(entry.tags)]
        case "GROUP":
            members = [{"task": one} if isinstance(one, str) else one for one in entry.cfg["task"]]
            changes = {**entry.cfg, **changes}
        case _:  # one that is a Python class loads its dataset by itself
            raise RiverError(
                f"task {str(name)[:80]!r} with documents; accepted: a task of lm-evaluation-harness that is "
                "written in YAML, or a group or tag of such tasks"
            )
    return [
        found
        for one in members
        for found in tasks_of(manager, one.get("group") or one.get("task"), {**changes, **one})
    ]


def task_files(manager: TaskManager, name: str, data: Path) -> dict[str, dict[str, str]]:
    """By task, of all that a name stands for, the file of each of its splits."""
    files: dict[str, dict[str, str]] = {}
    for task, config in tasks_of(manager, name):
        files[task] = files.get(task, {}) | split_files(config, task, data)
    return files


def split_files(config: dict, task: str, data: Path) -> dict[str, str]:
    """The file of each split that a task names.

    The harness opens them all. One that gives no examples is never shown, and may be missing: what is opened
    in its place is the split that is scored.
    """
    names = {config[key] for key in SPLITS if config.get(key)}
    scored = config.get("test_split") or config.get("validation_split")
    drawn = config.get("num_fewshot") and not (config.get("fewshot_config") or {}).get("samples")
    files = {name: data / task / f"{name}.jsonl" for name in sorted(names)}
    missing = [name for name in (files if drawn else [scored]) if not files[name].exists()]
    if missing:
        wanted = ", ".join(f"{task}/{name}.jsonl" for name in missing)
        raise RiverError(f"{data}: has no documents of {task}; accepted: a folder with {wanted}")
    for path in files.values():
        if path.exists():
            documents_of(path, fields=())  # says which line is odd, where the harness does not
    return {name: str(path if path.exists() else files[scored]) for name, path in files.items()}
