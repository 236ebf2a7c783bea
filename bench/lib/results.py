"""The committed results by the names that the documents' numbers are made of."""

import json

from bench.lib.common import RESULTS

FILES = {
    "calibrate-demo": "calibrate_bundled_cpu_amd_epyc_1t.json",
    "calibrate-135M": "calibrate_smollm2_cpu_amd_epyc_1t.json",
    "decode": "decode_cpu_amd_epyc_2t.json",
    "engine": "engine_cpu_amd_epyc_2t.json",
    "eval-demo": "eval_bundled_cpu_amd_epyc_1t.json",
    "gsm8k": "gsm8k_smollm2_cpu_amd_epyc_1t.json",
    "kv-strategies": "kv_strategies_cpu_amd_epyc_1t.json",
    "linear": "linear_cpu_amd_epyc_2t.json",
    "lossless": "lossless_cpu_amd_epyc_2t.json",
    "lossless-calibrated": "lossless_calibrated_cpu_amd_epyc_2t.json",
    "cycle": "lossless_cycle_cpu_amd_epyc_2t.json",
    "paper": "paper_cpu_amd_epyc_1t.json",
    "memory": "memory_smollm2_cpu_amd_epyc_1t.json",
    "peers": "peers_cpu_amd_epyc_2t.json",
    "peers-text": "peers_text_cpu_amd_epyc_1t.json",
    "prefill": "prefill_cpu_amd_epyc_2t.json",
    "river-135M": "calibrated_river_smollm2_cpu_amd_epyc_1t.json",
    "river-demo": "calibrated_river_bundled_cpu_amd_epyc_1t.json",
    "scale": "scale_smollm2_cpu_amd_epyc_1t.json",
    "serve": "serve_smollm2_cpu_amd_epyc_1t.json",
    "thresholds": "thresholds_cpu_amd_epyc_1t.json",
}


def result(name: str) -> dict:
    return json.loads((RESULTS / FILES[name]).read_text())


def the_line(lines: list[dict], **fields) -> dict:
    """The one of them that has these fields."""
    found = [line for line in lines if fields.items() <= line.items()]
    if len(found) != 1:
        raise ValueError(f"{len(found)} lines of the results have {fields}; accepted: one")
    return found[0]
