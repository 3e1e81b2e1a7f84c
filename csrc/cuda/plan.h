// How work is laid out on a GPU: plain host code, tested without one. The order of sums, and so
// their last bits, depends on the problem alone, never on the device.
#pragma once

#include <cstdint>

#include "../inline.h"

namespace greedyprune {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kNoUnit = INT64_MAX;

GREEDYPRUNE_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scoring candidates: a block takes a few units and one piece of the samples at a time.
constexpr int kScoreWarps = 8;
constexpr int64_t kMostPieces = 64;

// A thread holds units x samples outputs in registers, in a type of `bytes` bytes. Its samples are
// 16 bytes, and its warp's samples are a tile.
GREEDYPRUNE_INLINE constexpr int units_a_thread(int64_t bytes) { return bytes == 4 ? 8 : 4; }
GREEDYPRUNE_INLINE constexpr int samples_a_thread(int64_t bytes) {
  return static_cast<int>(16 / bytes);
}
GREEDYPRUNE_INLINE constexpr int64_t tile_of(int64_t bytes) {
  return kLanes * samples_a_thread(bytes);
}
// Blocks that a multiprocessor has registers for.
GREEDYPRUNE_INLINE constexpr int resident_blocks(int64_t bytes) { return bytes == 4 ? 2 : 1; }
// The classes whose weights a block holds: 16 KiB of shared memory.
GREEDYPRUNE_INLINE constexpr int classes_a_chunk(int64_t bytes) {
  return static_cast<int>(16384 / (units_a_thread(bytes) * bytes));
}

constexpr int64_t kTerms = 64;  // outputs that are summed in Real at a time

struct Pieces {
  int64_t count;
  int64_t size;  // samples in each but the last; a multiple of what a block takes at once
};

// Pieces short enough that several run side by side, and few enough that their sums take far less
// memory than the features.
GREEDYPRUNE_INLINE constexpr Pieces pieces_of(int64_t samples) {
  constexpr int64_t shortest = kScoreWarps * tile_of(4);
  const int64_t size = shortest * ceil_div(ceil_div(samples, kMostPieces), shortest);
  return size > 0 ? Pieces{ceil_div(samples, size), size} : Pieces{1, shortest};
}

// The number of blocks for `items` items of work on a device whose multiprocessors hold `resident`
// blocks each: no more than run at once, because a block takes one item after another.
constexpr int64_t blocks_of(int64_t items, int64_t multiprocessors, int64_t resident) {
  return items < multiprocessors * resident ? items : multiprocessors * resident;
}

}  // namespace greedyprune
