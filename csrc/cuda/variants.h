// Designs that hardware is to judge, each a switch: a measurement compares both values in one run. Results do not
// depend on them. The defaults are what is predicted to be faster (bench/NOTES.md).
#pragma once

#include <stdexcept>
#include <string>

namespace river::cuda {

struct Variants {
  bool late_trigger = true;     // a streaming kernel lets the next one start behind its last copy, not at once
  bool early_attention = true;  // attention asks L2 for its K and V while the kernels ahead still run
  bool deep_prefetch = true;    // with its ring full, a copying warp asks L2 for as much again
  bool full_grid = true;        // streaming kernels have a block on every SM, idle ones included
  bool paired_steps = true;     // device control: two steps in one graph
};

struct Variant {
  const char* name;
  bool Variants::* value;
};

inline constexpr Variant kVariants[] = {
    {"late_trigger", &Variants::late_trigger},   {"early_attention", &Variants::early_attention},
    {"deep_prefetch", &Variants::deep_prefetch}, {"full_grid", &Variants::full_grid},
    {"paired_steps", &Variants::paired_steps},
};

inline Variants variants;  // of the process; a captured graph keeps those of its capture

// Returns what it was.
inline bool set_variant(const std::string& name, int value) {
  std::string accepted;
  for (const Variant& variant : kVariants) {
    accepted += (accepted.empty() ? "" : ", ") + std::string(variant.name);
    if (name != variant.name) continue;
    if (value != 0 && value != 1)
      throw std::invalid_argument("variant " + name + " is " + std::to_string(value) + ", expected 0 or 1");
    const bool before = variants.*variant.value;
    variants.*variant.value = value;
    return before;
  }
  throw std::invalid_argument("variant '" + name + "', expected " + accepted);
}

}  // namespace river::cuda
