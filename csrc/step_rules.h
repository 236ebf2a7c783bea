// What decides a step, and what it writes down: the exit rule, the state of a row, the record of a step, which drafts
// are accepted. Written once for the CPU and the GPU. No function reads what a kernel has written: a kernel on a GPU
// loads what it hands over in its own way.
#pragma once

#include <math.h>

#include <cstdint>

#include "host_device.h"

namespace river {

// ---- the exit rule ----------------------------------------------------------------------------------

// A row agrees to run layer `index` as an exit layer if the similarity of layer index - 1 is above its bar: strictly
// above the threshold, and not before min_layers backbone layers; after `limit` of them, whatever the similarity. At
// index 0 there is none yet, and any number may stand for it. A row that has left the backbone stays outside.
RIVER_BOTH constexpr float exit_bar(float threshold, int index, int min_layers, int limit) {
  return index >= limit ? -INFINITY : index == 0 || index < min_layers ? INFINITY : threshold;
}
RIVER_BOTH constexpr bool row_agrees(bool left, float similarity, float bar) { return left || similarity > bar; }

// Whether an active row runs the layer as an exit layer. all_agree: all active rows do.
RIVER_BOTH constexpr bool row_exits(bool left, bool agrees, bool together, bool all_agree) {
  return left || (agrees && (all_agree || !together));
}

// ---- the end of a step ------------------------------------------------------------------------------

// Anything else, kNoToken of lm_head included, means that no token was drawn.
RIVER_BOTH constexpr bool is_drawn(int64_t token, int vocab_size) { return token >= 0 && token < vocab_size; }

// stop_tokens: [rows, count], which no kernel writes
RIVER_BOTH constexpr bool is_stop_token(const int64_t* stop_tokens, int count, int row, int64_t token) {
  const int64_t* own = stop_tokens + int64_t(row) * count;
  bool found = false;
  for (int i = 0; i < count; i++) found |= token == own[i];
  return found;
}

// The state of an active row after a step
struct NextRow {
  int position;       // of the token that the step drew
  int draw_position;  // of the token that the next step draws
  int remaining;      // tokens that the row may still draw
  bool ends;          // the token was the row's last one
};

// From the state before the step, and what the step drew
RIVER_BOTH constexpr NextRow next_row(int position, int remaining, bool drawn, bool stop_token) {
  return {.position = position + 1,
          .draw_position = position + 2,
          .remaining = remaining - 1,
          .ends = remaining <= 1 || !drawn || stop_token};
}

// ---- the record of a step ---------------------------------------------------------------------------

constexpr int kInactive = -1;  // in place of a token: the row is inactive;
constexpr int kFailed = -2;    // no token was drawn

RIVER_BOTH constexpr int32_t recorded_token(bool active, int64_t token, bool drawn) {
  return !active ? kInactive : drawn ? int32_t(token) : kFailed;
}

// int32: the stamp, which is the number of the step from 1 and written last; T exit depths; T tokens or codes; the
// similarities [layers, T] as fp32
struct RecordLayout {
  static constexpr int kStamp = 0, kDepths = 1;

  RIVER_BOTH static constexpr int tokens(int rows) { return kDepths + rows; }
  RIVER_BOTH static constexpr int similarities(int rows) { return tokens(rows) + rows; }
  RIVER_BOTH static constexpr int64_t size(int rows, int layers) { return similarities(rows) + int64_t(layers) * rows; }
};

// ---- lossless mode: drafts and their acceptance -----------------------------------------------------

// What becomes of a request that is drafting
struct NextDraft {
  bool counts;  // the draft is one, and is to be verified
  bool ends;    // the request drafts no more
};

// From draft `index`, counted from 0, of the `wanted` ones. What follows a wrong draft is wasted: none follows one that
// the river is not sure of.
RIVER_BOTH constexpr NextDraft next_draft(int index, int wanted, bool drawn, bool sure) {
  const bool counts = drawn && index < wanted;
  return {.counts = counts, .ends = !counts || !sure || index + 1 >= wanted};
}

// The new tokens of a request, from the rows of its verification in order. What was drawn from a row is its target; for
// as long as a row `follows` the new tokens, so does its target.
struct NewTokens {
  NextRow row;  // the state of the request after them
  int count;
  int64_t last;  // the newest, if there is one

  // Whether a row follows that was given `draft`. Row 0 was given the token before the new ones instead.
  RIVER_BOTH constexpr bool follows(bool active, int64_t draft) const {
    return active && (count == 0 || (!row.ends && draft == last));
  }
  RIVER_BOTH constexpr NewTokens with(int64_t target, bool drawn, bool stop_token) const {
    return {.row = next_row(row.position, row.remaining, drawn, stop_token), .count = count + 1, .last = target};
  }
};

// `position` is that of row 0.
RIVER_BOTH constexpr NewTokens no_new_tokens(int position, int remaining) {
  return {.row = {.position = position, .draw_position = position + 1, .remaining = remaining, .ends = false},
          .count = 0,
          .last = 0};
}

// int32: the stamp, which is the number of the cycle from 1 and written last; R numbers of new tokens, or kInactive;
// the new tokens [V, R], or kFailed for one that was not drawn, and kInactive past the end
struct CycleLayout {
  static constexpr int kStamp = 0, kCounts = 1;

  RIVER_BOTH static constexpr int tokens(int requests) { return kCounts + requests; }
  RIVER_BOTH static constexpr int size(int requests, int rows) { return tokens(requests) + rows; }
};

}  // namespace river
