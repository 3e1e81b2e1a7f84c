// The fibers behind cuda_runtime.h. A fiber starts by ucontext and changes by _setjmp and _longjmp,
// which save no signal mask and therefore need no system call.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kWarp = 32;

enum class State { ready, at_warp_barrier, at_block_barrier, done };

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf at;
  bool started = false;
  State state = State::ready;
  dim3 thread;
};

std::vector<Fiber> fibers;
std::vector<uint64_t> slots;
jmp_buf scheduler;
unsigned current;
const std::function<void()>* body;

void give_way(State state) {
  fibers[current].state = state;
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

void enter() {
  for (;;) {  // the next block uses the same fiber
    (*body)();
    give_way(State::done);
  }
}

void resume(unsigned i) {
  current = i;
  Fiber& fiber = fibers[i];
  threadIdx = fiber.thread;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// Runs the fibers [first, last) of a warp until each has ended or is at the block's barrier.
void run_warp(unsigned first, unsigned last, bool reverse) {
  for (;;) {
    unsigned waiting = 0, left = 0;
    for (unsigned i = first; i < last; ++i) {
      const unsigned fiber = reverse ? first + last - 1 - i : i;
      if (fibers[fiber].state == State::ready) resume(fiber);
      waiting += fibers[fiber].state == State::at_warp_barrier;
      left += fibers[fiber].state != State::done;
    }
    if (!waiting) return;
    if (waiting < left) {
      std::fprintf(stderr, "emulated CUDA: threads of a warp wait at different barriers\n");
      std::abort();
    }
    for (unsigned i = first; i < last; ++i)
      if (fibers[i].state == State::at_warp_barrier) fibers[i].state = State::ready;
  }
}

void run_block(unsigned threads, bool reverse) {
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].state = State::ready;
    fibers[i].thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  }
  for (bool left = true; left;) {
    const unsigned warps = (threads + kWarp - 1) / kWarp;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned first = kWarp * (reverse ? warps - 1 - i : i);
      run_warp(first, first + kWarp < threads ? first + kWarp : threads, reverse);
    }
    left = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].state == State::done) continue;
      fibers[i].state = State::ready;
      left = true;
    }
  }
}

}  // namespace

void wait_for_block() { give_way(State::at_block_barrier); }
void wait_for_warp() { give_way(State::at_warp_barrier); }

uint64_t* warp_slots() { return slots.data() + current / kWarp * kWarp; }

void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const char* order = std::getenv("EMULATED_ORDER");
  const bool reverse = order && order[0] == 'r';
  const unsigned threads = block.x * block.y * block.z;
  while (fibers.size() < 1024) {  // the most there can be, at once: they must not move
    fibers.emplace_back();
    fibers.back().stack.reset(new char[kStack]);
  }
  slots.resize(fibers.size() + kWarp);
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  const unsigned blocks = grid.x * grid.y;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned at = reverse ? blocks - 1 - i : i;
    blockIdx = {at % grid.x, at / grid.x};
    run_block(threads, reverse);
  }
}

}  // namespace emulated
