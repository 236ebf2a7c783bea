"""Plants mistakes of the kind a person makes, one at a time, and says which the tests let through.

    python tools/mutate.py [--list] [NAME ...]

Each entry of MUTANTS is an edit and the check that must fail on it: a pytest selection, or "gate" and a
kernel's file. To add one: pick a property that no test seems to hold, write the edit, see it survive, write
the test. Runs on demand (minutes: edits of C++ are compiled), in the tree as it is, and leaves it so.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = (".cpp", ".h", ".cu", ".cuh")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # stands there exactly once
    new: str
    check: str  # arguments of pytest; "gate FILE": of the compile gate


MUTANTS = [
    Mutant(
        "a client who goes keeps the slot",
        "river_ext/serve/worker.py",
        "self.engine.cancel(ticket)",
        "pass",
        "test_serve_faults.py -k frees_the_slot",
    ),
    Mutant(
        "a stream tells tokens again",
        "river_ext/serve/answer.py",
        "                tokens = []\n",
        "",
        "test_serve.py -k depths_are_told",
    ),
    Mutant(
        "true is as good as 1 where n is checked",
        "river_ext/serve/schema.py",
        "type(value) is type(one) and value == one",
        "value == one",
        "test_serve_refusals.py -k bodies_of_completions",
    ),
    Mutant(
        "scales between v and o go by KV heads one after the other",
        "river_ext/quant/imported/moved_scales.py",
        "arange(shape.num_key_value_heads).repeat_interleave(group)",
        "arange(shape.num_key_value_heads).repeat(group)",
        "test_imported.py -k moved_scales",
    ),
    Mutant(
        "an imported row keeps its scale while its partner's columns change theirs",
        "river_ext/quant/imported/moved_scales.py",
        "else self.grid.times(factors)",
        "else self.grid",
        "test_imported.py -k moved_scales",
    ),
    Mutant(
        "rows of q and k stay as a GGUF file orders them",
        "river_ext/loading/gguf_checkpoint.py",
        "return heads.transpose(1, 2).reshape(tensor.shape)",
        "return tensor",
        "test_gguf.py -k comes_back",
    ),
    Mutant(
        "all draw as the first row",
        "river_ext/engine/graph.py",
        "self.drawing.fill([row.request.sampling for row in rows])",
        "self.drawing.fill([rows[0].request.sampling for row in rows])",
        "test_graph.py -k first_ends",
    ),
    Mutant(
        "all leave as the first row, on the device",
        "river_ext/engine/graph.py",
        "[row.request.rule.thresholds for row in rows]",
        "[rows[0].request.rule.thresholds for row in rows]",
        "test_graph.py -k first_ends",
    ),
    Mutant(
        "the multiplier forgotten at down_proj",
        "csrc/cpu/layer.cpp",
        "to_residual(nullptr, middle.get(), a.out, rows)",
        "{.bias = nullptr, .multiplier = 1, .addend = middle.get(), .out = a.out, .rows = rows}",
        "test_decoder_block.py -k options",
    ),
    Mutant(
        "the multiplier forgotten, CUDA",
        "csrc/cuda/device/layer_epilogues.cuh",
        "before + multiplier * sum",
        "before + sum",
        "test_cuda_kernels.py -k layer",
    ),
    Mutant(
        "logits divided only where they are returned",
        "csrc/cpu/lm_head.cpp",
        "  const float* scores = sampled ? noisy : logits;\n",
        "  const float* scores = sampled ? noisy : sums;\n",
        "test_lm_head.py -k tie",
    ),
    Mutant(
        "the exit river's prompt without the multiplier",
        "river_ext/engine/matmul.py",
        "return add(hidden, down, self.config.residual_multiplier)",
        "return add(hidden, down, 1)",
        "test_matmul.py -k equals_the_ops",
    ),
    Mutant(
        "the epsilon of hidden as the checkpoint means it",
        "river_ext/loading/multipliers.py",
        "config.rms_norm_eps / embedding**2",
        "config.rms_norm_eps",
        "test_hf_parity.py -k granite",
    ),
    Mutant(
        "kv_valid by row",
        "csrc/cpu/attention.cpp",
        "a.kv_valid[int64_t(block.slot) * a.max_len + p]",
        "a.kv_valid[int64_t(order[block.first]) * a.max_len + p]",
        "test_decoder_block.py -k options",
    ),
    Mutant(
        "a row sees what the last row of its slot sees",
        "csrc/cpu/attention.cpp",
        ".end = index(int64_t(a.positions[row]) + 1)",
        ".end = count",
        "test_decode_attention.py -k other_rows",
    ),
    Mutant(
        "kv_valid by row, CUDA",
        "csrc/cuda/device/attention.cuh",
        "a.kv_valid[int64_t(rows.slot) * a.max_len + p]",
        "a.kv_valid[int64_t(blockIdx.z) * a.max_len + p]",
        "test_cuda_kernels.py -k layer_options",
    ),
    Mutant(
        "a V that a row does not see takes part",
        "csrc/cuda/device/attention.cuh",
        "p + kTile - 1 <= rows.all_last",
        "p <= rows.all_last",
        "test_slot_rows.py -k nan",
    ),
    Mutant(
        "each row reads the cache for itself",
        "csrc/cuda/device/slot_rows.cuh",
        "place.slot == rows.slot &&",
        "t == own &&",
        "test_slot_rows.py -k once",
    ),
    Mutant(
        "ties to any id",
        "csrc/cpu/lm_head.cpp",
        "if (score_ > score || (score_ == score && id_ < id))",
        "if (score_ > score)",
        "test_lm_head.py -k ties",
    ),
    Mutant(
        "a second best that another thread has",
        "csrc/cpu/lm_head.cpp",
        "    second = std::max(second, other.second);\n",
        "",
        "test_lm_head.py -k reference",
    ),
    Mutant(
        "a second best that another warp had before, CUDA",
        "csrc/cuda/lm_head.cu",
        "larger(state.second, smaller(before, state.best))",
        "state.second",
        "test_cuda_kernels.py -k margin",
    ),
    Mutant(
        "a draft after one that is not sure",
        "csrc/step_rules.h",
        "!counts || !sure ||",
        "!counts ||",
        "test_draft_advance.py -k sure",
    ),
    Mutant(
        "padding is drawn",
        "csrc/cpu/lm_head.cpp",
        "offer_strip(a, t, s * kTileRows, head.strip_rows(s), sums[t], local[t]);",
        "offer_strip(a, t, s * kTileRows, kTileRows, sums[t], local[t]);",
        "test_lm_head.py -k reference",
    ),
    Mutant(
        "padding is drawn, CUDA",
        "csrc/cuda/lm_head.cu",
        "t >= a.rows || n >= a.vocab_size",
        "t >= a.rows",
        "test_cuda_kernels.py -k lm_head",
    ),
    Mutant(
        "the second row of a W4 pair by the first one's nibbles",
        "csrc/cpu/isa/w4_strip.h",
        "high_rows = table[words >> 8]",
        "high_rows = table[words]",
        "test_linear.py -k equals_reference",
    ),
    Mutant(
        "few rows forget the tile that has no other beside it",
        "csrc/cpu/isa/w4_strip.h",
        "for (; tile < tiles; tile++) add_tiles",
        "for (; tile < 0; tile++) add_tiles",
        "test_linear.py -k equals_reference",
    ),
    Mutant(
        "many rows forget the columns before",
        "csrc/cpu/isa/dense_strip.h",
        "if (begin > 0) RIVER_UNROLL",
        "if (begin > end) RIVER_UNROLL",
        "test_linear.py -k any_number_of_rows",
    ),
    Mutant(
        "a place twice, rows apart",
        "csrc/ops/layers.cpp",
        "return place(i) < place(j);",
        "return i < j;",
        "test_decoder_block.py -k bad_arguments",
    ),
    Mutant(
        "similarity unscaled too far",
        "csrc/cpu/isa/similarity.h",
        "max >= 0x1p-40f && max <= 0x1p40f",
        "max >= 0x1p-40f && max <= 0x1p70f",
        "test_state_similarity.py -k magnitude",
    ),
    Mutant(
        "similarity unscaled too far, CUDA",
        "csrc/cuda/device/similarity.cuh",
        "max >= 0x1p-40f && max <= 0x1p40f",
        "max >= 0x1p-40f && max <= 0x1p70f",
        "test_cuda_kernels.py -k magnitude",
    ),
    Mutant(
        "a merge that swallows NaN",
        "csrc/cpu/isa/attention.h",
        "if (split.sum == 0) return;",
        "if (!(split.sum > 0)) return;",
        "test_decode_attention.py -k nan",
    ),
    Mutant(
        "a merge that swallows NaN, CUDA",
        "csrc/cuda/decode_attention.cu",
        "weights == 0 ? 0.f",
        "!(weights > 0) ? 0.f",
        "test_cuda_kernels.py -k nan",
    ),
    Mutant(
        "no wait before weights are copied",
        "csrc/cuda/device/stream.cuh",
        "    if (workspace.overlap != Overlap::kPrefetch) dependency_wait();\n",
        "",
        "test_emulated_ring.py -k kernel_ahead",
    ),
    Mutant(
        "a stage released too soon",
        "csrc/cuda/device/ring.cuh",
        "    __syncwarp();\n    if (lane_id() == 0) empty",
        "    if (lane_id() == 0) empty",
        "test_emulated_ring.py -k one_stage",
    ),
    Mutant(
        "no PTX by default",
        "build_backend/river_native.py",
        'ARCHS = "8.0;8.6;8.9;9.0+PTX"',
        'ARCHS = "8.0;8.6;8.9;9.0"',
        "test_packaging.py -k by_default",
    ),
    Mutant(
        "a module overwritten in place",
        "build_backend/river_native.py",
        "shutil.copyfile(library, temporary)",
        "shutil.copyfile(library, target); shutil.copyfile(library, temporary)",
        "test_packaging.py -k in_use",
    ),
    Mutant(
        "a block larger than half an SM",
        "csrc/cuda/device/ring.cuh",
        "kBlockBytes = 113 << 10",
        "kBlockBytes = 114 << 10",
        "test_cuda_kernels.py -k test_linear",
    ),
    Mutant(
        "no fence before an arrival",
        "csrc/cuda/device/split_k.cuh",
        "    gpu_fence();  // the sums of strip n",
        "    // the sums of strip n",
        "gate csrc/cuda/linear.cu",
    ),
    Mutant(
        "a failed row goes on",
        "csrc/step_rules.h",
        "remaining <= 1 || !drawn || stop_token",
        "remaining <= 1 || stop_token",
        "test_advance.py test_not_finite.py",
    ),
    Mutant(
        "a failed row goes on, CUDA",
        "csrc/cuda/advance.cu",
        "load_written(a.remaining + t), drawn, stop_token)",
        "load_written(a.remaining + t), true, stop_token)",
        "test_cuda_kernels.py -k advance",
    ),
    Mutant(
        "one depth for all rows",
        "csrc/cpu/step.cpp",
        "!a.exited[int64_t(depth) * a.rows + row]",
        "!a.exited[int64_t(depth) * a.rows]",
        "test_advance.py",
    ),
    Mutant(
        "stop tokens of the first row",
        "csrc/step_rules.h",
        "stop_tokens + int64_t(row) * count",
        "stop_tokens",
        "test_advance.py",
    ),
    Mutant(
        "one row leaves the others behind",
        "csrc/step_rules.h",
        "left || (agrees && (all_agree || !together))",
        "left || agrees",
        "test_dual_layer.py -k decision",
    ),
    Mutant(
        "a row takes the sums of its neighbour's path",
        "csrc/cuda/device/decided_stream.cuh",
        "if (mine & 2) sum[1]",
        "if (mine & 1) sum[1]",
        "test_cuda_kernels.py -k own_path",
    ),
    Mutant(
        "both formats for rows that agree",
        "csrc/cuda/device/decided_stream.cuh",
        "return paths.packed ? kBoth : kDense;",
        "return kBoth;",
        "test_weights_read.py",
    ),
    Mutant(
        "drafts behind a stop token",
        "csrc/step_rules.h",
        "(!row.ends && draft == last)",
        "draft == last",
        "test_accept.py",
    ),
    Mutant(
        "positions of a verification that stay, CUDA",
        "csrc/cuda/accept.cu",
        "found.row.position + i;",
        "found.row.position;",
        "test_lossless_kernels.py",
    ),
    Mutant(
        "idle blocks do not arrive",
        "csrc/cuda/device/stream.cuh",
        "if (warp_id() < kReaders) epilogue.end(none);",
        ";",
        "test_cuda_kernels.py -k lm_head",
    ),
    Mutant(
        "a step past the last one of a pair",
        "river_ext/engine/decoder.py",
        "last - self.replayed >= 2",
        "last > self.replayed",
        "test_graph.py -k how_far",
    ),
    Mutant(
        "a captured op lets its tensors go",
        "csrc/ops/check.h",
        "if (cpu::Graph::recording()) held_.push_back(t);",
        "(void)t;",
        "test_captured_ops.py -k holds",
    ),
    Mutant(
        "a captured op checks no value",
        "csrc/ops/dispatch.h",
        "graph->add([run, held = check.held()](const auto& p) { run(p); })",
        "graph->add([args, on_cpu, held = check.held()](const auto& p) { on_cpu(args, p); })",
        "test_captured_ops.py -k checked",
    ),
    Mutant(
        "slots that may change once they are checked",
        "csrc/ops/cache.h",
        "  args.slots = check.own(args.slots, args.rows);\n",
        "",
        "test_captured_ops.py",
    ),
    Mutant(
        "a call in a graph comes an op late",
        "river_ext/engine/cpu_graph.py",
        "(len(self._ops), function)",
        "(len(self._ops) + 1, function)",
        "test_cpu_graph.py",
    ),
    Mutant(
        "noise by 31 bits",
        "csrc/philox.h",
        "const float high = product(float(int32_t(word >> 16)), 65536.f)",
        "word &= ~1u; const float high = product(float(int32_t(word >> 16)), 65536.f)",
        "test_philox.py",
    ),
    Mutant(
        "caches that overlap",
        "csrc/ops/layers.cpp",
        'check.written({"exited", "similarities", "k_cache", "v_cache"});',
        'check.written({"exited", "similarities"});',
        "test_op_memory.py",
    ),
    Mutant(
        "a river that is not hashed",
        "river_ext/quant/exit_river.py",
        'if sha256_of(stored) != facts["sha256"]:',
        "if False:",
        "test_exit_river.py",
    ),
    Mutant(
        "a part of a prompt is taken for all of it",
        "river_ext/engine/slots.py",
        "if len(sequence.tokens) <= first:",
        "if len(sequence.tokens) < first:",
        "test_engine.py -k cancelled_nothing",
    ),
    Mutant(
        "slots keep what they held before clear",
        "river_ext/engine/engine.py",
        "        self._slots.clear()\n",
        "        self._slots.free = list(range(self.slots))\n",
        "test_engine.py -k after_clear",
    ),
    Mutant(
        "requests in cycles survive clear",
        "river_ext/engine/engine.py",
        "*self._batches, self._ending, self._events",
        "self._steps, self._ending, self._events",
        "test_engine.py -k left_after_clear",
    ),
    Mutant(
        "prompts hold up those that draft",
        "river_ext/engine/engine.py",
        "sequence, others = running.sequence, any(self._batches)",
        "sequence, others = running.sequence, self._steps",
        "test_engine.py -k hold_up",
    ),
    Mutant(
        "a slot's last position stays empty",
        "river_ext/engine/engine.py",
        "if needed > self.max_len:",
        "if needed >= self.max_len:",
        "test_engine.py -k fill_its_slot",
    ),
    Mutant(
        "the seconds of a prompt's last piece",
        "river_ext/engine/sequence.py",
        "self.prefill_seconds += seconds",
        "self.prefill_seconds = seconds",
        "test_engine.py -k pieces",
    ),
    Mutant(
        "a slot offers what was left out of it",
        "river_ext/engine/slots.py",
        "written = written[:by_backbone]",
        "written = written[:]",
        "test_kv_strategies.py -k slot_holds",
    ),
    Mutant(
        "what is missing is forgotten at a new start",
        "river_ext/engine/kv_strategies.py",
        "self.kv_valid[:, row.slot, decoded] = index < depths",
        "self.kv_valid[:, row.slot, decoded] = True",
        "test_kv_strategies.py -k come_and_go",
    ),
    Mutant(
        "the newest is recomputed first",
        "river_ext/engine/kv_strategies.py",
        "return sorted(",
        "return (lambda late: sorted(late, reverse=True))(",
        "test_kv_strategies.py -k many_tokens",
    ),
    Mutant(
        "one row's exit depth bounds all others",
        "river_ext/engine/kv_strategies.py",
        "min(row.request.rule.limit, row.exits.depths[-1])",
        "min(row.request.rule.limit, self.rows[min(self.rows)].exits.depths[-1])",
        "test_kv_strategies.py -k come_and_go",
    ),
    Mutant(
        "who joins waits for the others' end",
        "river_ext/engine/batch.py",
        "self.decoder.step(run_ahead and not changes)",
        "self.decoder.step(run_ahead)",
        "test_engine.py -k who_joins",
    ),
    Mutant(
        "the queue without its lock",
        "river_ext/engine/engine.py",
        "        with self._lock:\n            while self._queue and self._slots.free:",
        "        with threading.Lock():\n            while self._queue and self._slots.free:",
        "test_engine.py -k under_the_lock",
    ),
    Mutant(
        "a slot is free before its steps end",
        "river_ext/engine/engine.py",
        "        self._memory.lead_caller()  # steps in flight may still write to the slot\n",
        "",
        "test_streams.py",
    ),
    Mutant(
        "records cleared under steps in flight",
        "river_ext/engine/graph.py",
        "self.memory.synchronise()  # rows that were dropped",
        "# rows that were dropped",
        "test_streams.py",
    ),
    Mutant(
        "logits copied before they are there",
        "river_ext/engine/decoder.py",
        "        self.memory.lead_caller()\n        copied = logits.clone()\n",
        "        copied = logits.clone()\n",
        "test_streams.py",
    ),
    Mutant(
        "steps begin before their rows are there",
        "river_ext/engine/graph.py",
        "self.drawing.fill([row.request.sampling for row in rows])\n        self.memory.follow_caller()",
        "self.drawing.fill([row.request.sampling for row in rows])",
        "test_streams.py",
    ),
    Mutant(
        "cycles begin before their rows are there",
        "river_ext/engine/lossless.py",
        "positions.copy_(self.verify_positions + 1)\n        self.memory.follow_caller()",
        "positions.copy_(self.verify_positions + 1)",
        "test_streams.py",
    ),
    Mutant(
        "unused rows keep their slots",
        "river_ext/engine/graph.py",
        "        self.slots.fill_(-1)\n        self.stop_tokens",
        "        self.stop_tokens",
        "test_streams.py",
    ),
    Mutant(
        "an engine keeps the control of its last call",
        "river_ext/engine/generate.py",
        "        engine.use(exit_control)\n",
        "",
        "test_graph.py -k takes_the_control",
    ),
    Mutant(
        "stop tokens of another run, lossless",
        "river_ext/engine/lossless.py",
        "(self.slots, self.verify_slots, self.stop_tokens, self.drafts)",
        "(self.slots, self.verify_slots, self.drafts)",
        "test_lossless.py -k failed_reaches",
    ),
    Mutant(
        "drafts learned from the wrong count",
        "river_ext/engine/lossless.py",
        "min(drafted, len(news) - 1)",
        "min(drafted, len(news))",
        "test_lossless.py -k learned",
    ),
    Mutant(
        "drafts learned from another request",
        "river_ext/engine/lossless.py",
        "made[index]\n            self.rows",
        "max(made)\n            self.rows",
        "test_lossless.py -k learned",
    ),
    Mutant(
        "a draft that cannot become a token",
        "river_ext/engine/lossless.py",
        "min(runner.tokens - 1, self.remaining[index] - 1)",
        "min(runner.tokens - 1, self.remaining[index])",
        "test_lossless.py -k become",
    ),
    Mutant(
        "a prompt drawn by the river's head",
        "river_ext/engine/prefill.py",
        "request.river_head and request.rule.limit == 0",
        "request.river_head",
        "test_generate.py -k full_depth_draws",
    ),
    Mutant(
        "a new conversation without its system message",
        "river_cli/chat.py",
        "    def forget(self) -> None:\n        self.messages = list(self._first)",
        "    def forget(self) -> None:\n        self.messages, self._first = list(self._first), []",
        "test_chat_command.py -k system_message_again",
    ),
    Mutant(
        "what was refused is a turn",
        "river_cli/chat.py",
        "        except RiverError as error:\n            if",
        "        except RiverError as error:\n            self.messages = messages\n            if",
        "test_chat_command.py -k refused_is",
    ),
    Mutant(
        "KL the other way round",
        "river_ext/calibration/agreement.py",
        "(p.exp() * (p - q))",
        "(q.exp() * (q - p))",
        "test_calibration.py -k definition",
    ),
    Mutant(
        "layers made in another dtype are taken",
        "river_ext/calibration/river.py",
        '        "dtype": str(network.dtype),\n',
        "",
        "test_calibration.py -k another_model",
    ),
    Mutant(
        "a split that no row sees is added twice",
        "csrc/cpu/attention.cpp",
        "      for (int i = 0; i < room.heads; i++) one.at(i)->sum = 0;\n",
        "",
        "test_decode_attention.py -k rows_of_prompts",
    ),
    Mutant(
        "a sum overwritten while others read it",
        "csrc/cuda/sample.cu",
        "  __syncthreads();  // nobody reads an earlier result any more\n",
        "",
        "test_sample_kernel.py -k cut_offs",
    ),
    Mutant(
        "an answer past the model's last position",
        "river_cli/chat.py",
        "min(self.engine.max_len + 1, self.engine.network.config.max_length)",
        "(self.engine.max_len + 1)",
        "test_chat_command.py -k answer_may",
    ),
    Mutant(
        "nothing rotates anew",
        "river_ext/engine/request.py",
        "rotates_anew_after=config.rotates_anew_after,",
        "rotates_anew_after=None,",
        "test_longrope.py -k among",
    ),
    Mutant(
        "steps pass the switch of longrope",
        "river_ext/engine/sequence.py",
        "min(left, last + 1 - known)",
        "left",
        "test_longrope.py -k among",
    ),
    Mutant(
        "what rotates otherwise is taken over",
        "river_ext/engine/slots.py",
        "rotation(running.prefilled)",
        "rotation(len(sequence.request.prompt))",
        "test_longrope.py -k taken_over",
    ),
    Mutant(
        "a part of it rotates anew",
        "river_ext/engine/slots.py",
        "[0 if running.sequence.tokens else self._held(request, slot)",
        "[self._held(request, slot)",
        "test_longrope.py -k taken_over",
    ),
    Mutant(
        "a window in every layer",
        "river_ext/engine/network.py",
        " and index not in config.full_attention_layers",
        "",
        "test_hf_parity.py -k windows",
    ),
    Mutant(
        "all layers rotate",
        "river_ext/engine/network.py",
        "self._rotates = index not in config.nope_layers",
        "self._rotates = True",
        "test_hf_parity.py -k smollm3",
    ),
    Mutant(
        "yarn without its attention factor",
        "river_ext/loading/rope.py",
        "(angles.cos() * factor)",
        "angles.cos()",
        "test_rope.py -k yarn",
    ),
    Mutant(
        "queries of a long prompt are not scaled",
        "river_ext/engine/matmul.py",
        "            q = q * scale[start:stop, None, None]\n",
        "            pass\n",
        "test_matmul.py -k query",
    ),
    Mutant(
        "query scales grow at every position",
        "river_ext/loading/rope.py",
        "torch.arange(max_len) // interval",
        "torch.arange(max_len) / interval",
        "test_rope.py -k query",
    ),
    Mutant(
        "k and v of a fused tensor swapped",
        "river_ext/loading/checkpoint.py",
        "return zip(fields, tensor",
        "return zip(reversed(fields), tensor",
        "test_hf_parity.py -k phi3",
    ),
    Mutant(
        "a buffer overwritten while its layer computes",
        "river_ext/engine/offload.py",
        "        for user in self.users:\n            stream.wait_stream(user)\n",
        "",
        "test_offload.py -k among_others",
    ),
    Mutant(
        "one buffer for all streamed layers",
        "river_ext/engine/offload.py",
        "self._buffers[(index - self.first_fetched) % len(self._buffers)]",
        "self._buffers[0]",
        "test_emulated_engine.py -k streamed",
    ),
    Mutant(
        "a layer that computes before its copy has landed",
        "river_ext/engine/offload.py",
        "                stream.wait_stream(self._copies)\n",
        "",
        "test_emulated_engine.py -k late",
    ),
    Mutant(
        "pages that are of no file are given back",
        "river_ext/loading/offloaded.py",
        "if size > 0 and any(low <= start and end <= high for low, high in files):",
        "if size > 0:",
        "test_offload.py -k no_file",
    ),
]


def survives(mutant: Mutant) -> bool:
    """Whether the check passes with the edit in place."""
    path = ROOT / mutant.file
    original = path.read_bytes()
    text = original.decode()
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: its text stands {text.count(mutant.old)} times in {mutant.file}, not once")
    try:
        path.write_text(text.replace(mutant.old, mutant.new))
        if not built(path):  # nothing was tested
            sys.exit(f"{mutant.name}: {mutant.file} does not compile with it")
        return passes(mutant.check)
    finally:
        path.write_bytes(original)
        built(path)


def built(path: Path) -> bool:
    """The extension with this file as it is. The tests build the emulated GPU themselves."""
    if path.suffix not in BUILT:
        return True
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def passes(check: str) -> bool:
    words = check.split()
    if words[0] == "gate":
        command = [sys.executable, "tools/compile_gate.py", "--archs", "90a", *words[1:]]
    else:
        files = [
            str(*(ROOT / "python_tests").rglob(word)) if word.endswith(".py") else word for word in words
        ]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if words[0] != "gate" and done.returncode in (4, 5):  # a command line pytest refuses, and no tests
        sys.exit(f"{check}: selects no test\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", metavar="NAME", help="of mutants, or parts of names (default: all)")
    p.add_argument("--list", action="store_true", help="name the mutants and end")
    args = p.parse_args()
    chosen = [m for m in MUTANTS if not args.names or any(name in m.name for name in args.names)]
    if not chosen:
        p.error(f"no mutant {args.names[0]!r}; --list names them")
    survivors = []
    for mutant in chosen:
        if args.list:
            print(f"{mutant.name:36} {mutant.file}")
            continue
        survived = survives(mutant)
        survivors += [mutant.name] if survived else []
        print(f"{'SURVIVED' if survived else 'caught':9} {mutant.name}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
