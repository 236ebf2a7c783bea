// Prints the orders of csrc/row_order.h for test_row_order.py, and proves by compiling that both of their directions
// agree. Arguments: heads, KV heads, head_dim, rotary_dim, intermediate size.
#include "../../csrc/row_order.h"

#include <cstdio>
#include <cstdlib>

namespace {

using namespace river;

// Every row of every strip leads back to itself, and no head of Q, K or V lacks a row.
constexpr bool is_inverse(const QkvOrder& order) {
  int real = 0;
  for (int strip = 0; strip < order.strips(); strip++)
    for (int r = 0; r < kTileRows; r++) {
      const QkvRow at = order.row(strip, r);
      if (at.head < 0) continue;
      real++;
      if (at.head >= order.heads(at.kind) || at.dim < 0 || at.dim >= order.head_dim) return false;
      if (order.packed_row(at) != strip * kTileRows + r) return false;
    }
  return real == (order.num_heads + 2 * order.num_kv_heads) * order.head_dim;
}

// What a strip of Q or K says of its heads is what its rows say.
constexpr bool heads_are_right(const QkvOrder& order) {
  for (const QkvKind kind : {kQuery, kKey})
    for (int head = 0; head < order.heads(kind); head++) {
      int strips = 0;
      for (int strip = order.first_strip(kind); strip < order.strips() && order.kind_of(strip) == kind; strip++) {
        bool holds = false;
        for (int r = 0; r < kTileRows; r++) holds |= order.row(strip, r).head == head;
        if (holds != (order.first_head(strip) <= head && head <= order.last_head(strip))) return false;
        strips += holds;
      }
      if (strips != order.strips_of_head(head)) return false;
    }
  return true;
}

// Dims of a run follow each other in packed rows.
constexpr bool runs_are_right(const QkvOrder& order) {
  for (const QkvKind kind : {kQuery, kKey, kValue})
    for (int head = 0; head < order.heads(kind); head++)
      for (int dim = 0; dim < order.head_dim; dim++) {
        const int row = order.packed_row({kind, head, dim}), run = order.run(kind, head, dim);
        if (run < 1 || dim + run > order.head_dim) return false;
        for (int i = 0; i < run; i++)
          if (order.packed_row({kind, head, dim + i}) != row + i) return false;
      }
  return true;
}

constexpr bool is_inverse(int channels) {
  int real = 0;
  for (int strip = 0; strip < gate_up_strips(channels); strip++)
    for (int r = 0; r < kTileRows; r++) {
      const GateUpRow at = gate_up_row(strip, r);
      if (packed_row(at) != strip * kTileRows + r) return false;
      real += at.channel < channels;
    }
  return real == 2 * channels;
}

constexpr bool all_runs_are_right() {
  for (int head_dim = 2; head_dim <= 22; head_dim += 4)
    for (int rotary_dim = 0; rotary_dim <= head_dim; rotary_dim += 2)
      if (!runs_are_right(QkvOrder(3, 1, head_dim, rotary_dim))) return false;
  return true;
}

static_assert(all_runs_are_right());

constexpr bool all_inverse() {
  for (int head_dim = 2; head_dim <= 22; head_dim += 2)
    for (int rotary_dim = 0; rotary_dim <= head_dim; rotary_dim += 2)
      for (int heads = 1; heads <= 5; heads += 2) {
        const QkvOrder order(heads, (heads + 1) / 2, head_dim, rotary_dim);
        if (!is_inverse(order) || !heads_are_right(order)) return false;
      }
  for (int channels = 1; channels <= 33; channels++)
    if (!is_inverse(channels)) return false;
  return true;
}

static_assert(all_inverse());

}  // namespace

// Two lines: of each packed row, its row in [q; k; v], and its row in [gate; up]. Padding is -1.
int main(int, char** argv) {
  const int heads = atoi(argv[1]), kv_heads = atoi(argv[2]), head_dim = atoi(argv[3]), rotary_dim = atoi(argv[4]);
  const int channels = atoi(argv[5]);
  const QkvOrder order(heads, kv_heads, head_dim, rotary_dim);
  const int first_head[] = {0, heads, heads + kv_heads};
  for (int n = 0; n < order.strips() * kTileRows; n++) {
    const QkvRow at = order.row(n / kTileRows, n % kTileRows);
    printf("%d ", at.head < 0 ? -1 : (first_head[at.kind] + at.head) * head_dim + at.dim);
  }
  printf("\n");
  for (int n = 0; n < gate_up_strips(channels) * kTileRows; n++) {
    const GateUpRow at = gate_up_row(n / kTileRows, n % kTileRows);
    printf("%d ", at.channel < channels ? at.up * channels + at.channel : -1);
  }
}
