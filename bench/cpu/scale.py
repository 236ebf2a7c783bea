"""One and two replicas on Ray, on the CPU: requests per second, and what the lines of a file take.

A replica has one thread. Clients, Ray's proxy and its other processes share the machine with the replicas,
and where there are two cores, two replicas have none of their own. Two parts:

- serving: the same requests at once to one replica, to two, and by an engine in this process, in turns. The
  share is of the engine's requests per second.
- offline: the lines of a file by one replica and by two, in turns. The start of Ray and of the replicas is
  counted for itself: it ends with the first answers. The speed is that after the first answers of each.
"""

import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx
import torch

import river_ext
from bench.cpu.serve import body_of, engine_speed, request_of
from bench.lib.common import machine, parser, results_path, save
from river_ext import scale

PARTS = ("serving", "offline")
REPLICAS = (1, 2)


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--model", help="a checkpoint's directory; the bundled model where none is named")
    p.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    p.add_argument("--requests", type=int, default=32, help="of a turn, half of them at once")
    p.add_argument("--lines", type=int, default=384)
    p.add_argument("--new-tokens", type=int, default=16)
    p.add_argument("--turns", type=int, default=2)
    p.add_argument("--port", type=int, default=8123)
    p.set_defaults(threads=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    name = Path(args.model).name if args.model else "bundled"
    path = results_path(f"scale_{name}", args)
    results = {"machine": machine(), "model": name, "new_tokens": args.new_tokens}
    for part in args.parts:
        results[part] = globals()[part](args)
        print(part, json.dumps(results[part], indent=1), flush=True)
    print(save(path, results))


# --- serving --------------------------------------------------------------------------------------------


def serving(args) -> list[dict]:
    import ray
    from ray import serve

    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init("local", num_cpus=sum(REPLICAS) * args.threads, **quiet)
    serve.start(http_options={"port": args.port}, logging_config={"log_level": "ERROR"})
    for count in REPLICAS:
        asked = {"model": args.model, "replicas": count, "threads": args.threads, "max_len": 512}
        serve.run(scale.app(asked), name=f"r{count}", route_prefix=f"/r{count}")
    try:
        return serving_turns(args)
    finally:
        serve.shutdown()
        ray.shutdown()


def serving_turns(args) -> list[dict]:
    at_once, bodies = args.requests // 2, [body_of(n, args.new_tokens) for n in range(args.requests)]
    speeds = {count: [] for count in (0, *REPLICAS)}  # requests per second; 0: the engine
    with river_ext.load(args.model, device="cpu").engine(slots=8, max_len=512) as engine:
        for _ in range(args.turns + 1):
            start = time.perf_counter()
            engine_speed(engine, at_once, args.requests, args.new_tokens)
            speeds[0].append(args.requests / (time.perf_counter() - start))
            for count in REPLICAS:
                url = f"http://127.0.0.1:{args.port}/r{count}/v1/completions"
                speeds[count].append(args.requests / asyncio.run(seconds_of(url, bodies, at_once)))
    engine, *_ = (turns[1:] for turns in speeds.values())  # the first turn warms up
    return [
        {
            "replicas": count, "at_once": at_once, "requests_per_second": median(speeds[count][1:]),
            "engine_requests_per_second": median(engine),
            "shares": [a / b for a, b in zip(speeds[count][1:], engine, strict=True)],
        }
        for count in REPLICAS
    ]  # fmt: skip


async def seconds_of(url: str, bodies: list[dict], at_once: int) -> float:
    """Of requests that are no streams."""
    places = asyncio.Semaphore(at_once)

    async def one(body: dict) -> None:
        async with places:
            (await client.post(url, json=body)).raise_for_status()

    async with httpx.AsyncClient(timeout=600) as client:
        start = time.perf_counter()
        await asyncio.gather(*map(one, bodies))
        return time.perf_counter() - start


# --- offline --------------------------------------------------------------------------------------------


def offline(args) -> list[dict]:
    from river_ext.scale import offline as module

    module.ROWS = 16  # so that both replicas have work to the end
    turns = {count: [] for count in REPLICAS}  # seconds to the first answers, and lines per second after them
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text("".join(json.dumps(line_of(n, args)) + "\n" for n in range(args.lines)))
        for _ in range(args.turns):
            for count in REPLICAS:
                turns[count].append(file_speed(args, module, prompts, Path(folder, "answers"), count))
    return [
        {
            "replicas": count, "lines": args.lines, "start_seconds": median(start for start, _ in found),
            "lines_per_second": median(speed for _, speed in found), "turns": [speed for _, speed in found],
        }
        for count, found in turns.items()
    ]  # fmt: skip


def line_of(number: int, args) -> dict:
    options = request_of(number, args.new_tokens)
    return {"prompt": options.pop("prompt"), "options": options}


def file_speed(args, module, prompts: Path, answers: Path, replicas: int) -> tuple[float, float]:
    times, append = [], module.Answers.append

    def timed(self, given) -> None:
        append(self, given)
        times.append(time.perf_counter())

    module.Answers.append, start = timed, time.perf_counter()
    try:
        scale.generate_file(
            prompts, answers, args.model, replicas=replicas, threads=args.threads, max_len=512, force=True
        )
    finally:
        module.Answers.append = append
    lines = args.lines - replicas * module.ROWS  # when one has the first answers, so has the other one
    return times[0] - start, lines / (times[-1] - times[replicas - 1])


if __name__ == "__main__":
    main()
