// Embeddings of tokens that were just drawn, for the kernels that end a step.
#pragma once

#include "../../river.h"
#include "arch.cuh"

namespace river::device {

// By all threads of a block: the embedding of each row's token. A thread has a column of 16 bytes and asks for it of
// all rows before it writes one.
template <int kThreads, class... Outputs>
RIVER_DEVICE void embed(const int64_t (&tokens)[kMaxRows],  // kNoToken: of this row nothing is written
                        const void* embed_tokens,           // [vocab, hidden]
                        int hidden_size,
                        Outputs*... outputs) {  // each [rows, hidden]
  const int64_t pieces = hidden_size / 8;       // in a row
  for (int column = threadIdx.x; column < pieces; column += kThreads) {
    uint4 piece[kMaxRows] = {};
#pragma unroll
    for (int row = 0; row < kMaxRows; row++)
      if (tokens[row] != kNoToken) piece[row] = static_cast<const uint4*>(embed_tokens)[tokens[row] * pieces + column];
#pragma unroll
    for (int row = 0; row < kMaxRows; row++)
      if (tokens[row] != kNoToken) ((static_cast<uint4*>(outputs)[row * pieces + column] = piece[row]), ...);
  }
}

// In lossless mode: that of each request's token, to its row of `hidden` and to that of verify_hidden, counted from
// first_row
template <int kThreads>
RIVER_DEVICE void embed(const LosslessArgs& a, const int64_t (&tokens)[kMaxRows], int first_row) {
  uint4* verify_hidden = static_cast<uint4*>(a.verify_hidden) + int64_t(first_row) * (a.hidden_size / 8);
  embed<kThreads>(tokens, a.embed_tokens, a.hidden_size, a.hidden, verify_hidden);
}

}  // namespace river::device
