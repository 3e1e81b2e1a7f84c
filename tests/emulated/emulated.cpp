// The fibers behind cuda_runtime.h. A fiber starts in ucontext and changes over by _setjmp and
// _longjmp, which save no signal mask and so call no system.
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
  (*body)();
  fibers[current].state = State::done;
  _longjmp(scheduler, 1);
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

// Lets fibers [first, last) go on if all that have not ended wait at this barrier; were any?
bool release(unsigned first, unsigned last, State barrier) {
  bool any = false;
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].state == State::done) continue;
    if (fibers[i].state != barrier) return false;
    any = true;
  }
  for (unsigned i = first; any && i < last; ++i)
    if (fibers[i].state == barrier) fibers[i].state = State::ready;
  return any;
}

void run_block(unsigned threads, bool reverse) {
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].started = false;
    fibers[i].state = State::ready;
    fibers[i].thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  }
  for (;;) {
    bool moved = false, left = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned fiber = reverse ? threads - 1 - i : i;
      if (fibers[fiber].state == State::ready) {
        resume(fiber);
        moved = true;
      }
      left = left || fibers[fiber].state != State::done;
    }
    if (!left) return;
    for (unsigned i = 0; i < threads; i += kWarp)
      moved =
          release(i, i + kWarp < threads ? i + kWarp : threads, State::at_warp_barrier) || moved;
    moved = release(0, threads, State::at_block_barrier) || moved;
    if (!moved) {
      std::fprintf(stderr, "emulated CUDA: threads wait at different barriers\n");
      std::abort();
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
  while (fibers.size() < threads) {
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
