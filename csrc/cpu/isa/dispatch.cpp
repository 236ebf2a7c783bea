// Picks the instruction set at run time: the best this machine supports, unless set_isa chose another.
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace river::cpu {

#if defined(__x86_64__)
extern const Kernels kernels_avx512_bf16, kernels_avx512, kernels_avx2;
#endif
extern const Kernels kernels_portable;

namespace {

struct Supported {
  const Kernels* tables[5] = {};
  const char* names[5] = {};

  Supported() {
    int n = 0;
    auto add = [&](const Kernels& table) {
      tables[n] = &table;
      names[n++] = table.name;
    };
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // F16C is older
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) add(kernels_avx512_bf16);
    if (avx512) add(kernels_avx512);
    if (avx2) add(kernels_avx2);
#endif
    add(kernels_portable);
  }
};

const Supported& supported() {
  static const Supported instance;
  return instance;
}

// L1 is the shorter way, if it can wait for enough lines. Zen 5's (family 26) can. With that of Zen 4, which waits for
// 24, two cores got two thirds of what memory gives, and half where five rows shared a weight.
bool l1_asks() {
#if defined(__x86_64__)
  unsigned signature = 0, b, c, d;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &signature, &b, &c, &d)) return false;
  return (signature >> 8 & 0xf) + (signature >> 20 & 0xff) >= 26;
#else
  return false;
#endif
}

const Kernels*& current() {
  static const Kernels* table = supported().tables[0];
  return table;
}

}  // namespace

const bool kL1Asks = l1_asks();
const Kernels& kernels() { return *current(); }
const char* isa() { return current()->name; }
const char* const* supported_isas() { return supported().names; }

bool set_isa(const char* name) {
  for (const Kernels* table : supported().tables)
    if (table && strcmp(table->name, name) == 0) {
      current() = table;
      return true;
    }
  return false;
}

}  // namespace river::cpu
