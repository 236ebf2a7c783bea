// Embeddings of tokens that were just drawn, for the kernels that end a step of lossless mode.
#pragma once

#include "../../river.h"
#include "arch.cuh"

namespace river::device {

// By all threads of a block: the embedding of each request's token to its row of `hidden`, and to its row of
// verify_hidden, counted from first_row. A thread has a column of 16 bytes and asks for it of all requests before it
// writes one. tokens: kNoToken where nothing is to be written, and past the last request
template <int kThreads>
RIVER_DEVICE void embed(const LosslessArgs& a, const int64_t (&tokens)[kMaxRows], int first_row) {
  const int64_t pieces = a.hidden_size / 8;  // in a row
  const uint4* embed_tokens = static_cast<const uint4*>(a.embed_tokens);
  uint4* hidden = static_cast<uint4*>(a.hidden);
  uint4* verify_hidden = static_cast<uint4*>(a.verify_hidden) + first_row * pieces;
  for (int column = threadIdx.x; column < pieces; column += kThreads) {
    uint4 piece[kMaxRows] = {};
#pragma unroll
    for (int r = 0; r < kMaxRows; r++)
      if (tokens[r] != kNoToken) piece[r] = embed_tokens[tokens[r] * pieces + column];
#pragma unroll
    for (int r = 0; r < kMaxRows; r++)
      if (tokens[r] != kNoToken) hidden[r * pieces + column] = verify_hidden[r * pieces + column] = piece[r];
  }
}

}  // namespace river::device
