// See hopper.h: barriers, copies and named barriers. What is under way is done by step(), which the scheduler calls now and then, and when no thread can go on.
#include <map>
#include <vector>

#include "hopper.h"
#include "races.h"

#define HERE __builtin_return_address(0)

namespace host::async {
namespace {

using blip3o::hopper::TensorMap;

struct State {  // of an mbarrier
  unsigned count, pending, parity = 0;
  int bytes = 0;
  size_t initialiser, agent;
  uint32_t copies = 0;
  bool shown = false;  // to TMA
  races::Clock gathered, ended;
};

struct Copy {
  char* to;
  TensorMap map;      // of a panel
  const char* bytes;  // of none
  int size;
  State* state;
  int at[4];
  size_t thread;
  uint32_t when;
  races::Clock knows;
};

struct Named {
  int threads = 0, there = 0;
  unsigned turn = 0;
  races::Clock gathered, ended;
};

std::map<const void*, State> barriers;
std::vector<Copy> copies;
Named named[16];

State& state_of(blip3o::hopper::Barrier* barrier, const void* code) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("uses a barrier that was not initialised", code);
  if (races::ON) races::access(barrier, sizeof *barrier, false, code);
  return found->second;
}

void end_if_complete(State& state) {
  if (state.pending || state.bytes) return;
  state.parity ^= 1;
  state.pending = state.count;
  state.ended = state.gathered;
  wake(&state);
}

void arrive_at(State& state, const void* code) {
  if (!state.pending) fail("arrives at a barrier once too often", code);
  races::give(state.gathered, number());
  --state.pending;
  end_if_complete(state);
}

void write(const Copy& copy, char* to, const void* from, size_t size) {
  if (races::ON) races::access(to, size, true, races::Agent{copy.state->agent, copy.when, &copy.knows, copy.thread});
  std::memcpy(to, from, size);
}

void write_panel(const Copy& copy) {
  const TensorMap& map = copy.map;
  const int64_t head = copy.at[2], batch = copy.at[3];
  const bool there = head >= 0 && head < map.sizes[2] && batch >= 0 && batch < map.sizes[3];
  const uint32_t base = blip3o::hopper::shared_address(copy.to);
  for (int row = 0; row < map.rows; ++row) {
    const int64_t token = static_cast<int64_t>(copy.at[1]) + row;
    const char* from = map.data + batch * map.strides[2] + head * map.strides[1] + token * map.strides[0];
    for (uint32_t column = 0; column < 64; column += 8) {
      const int64_t dim = static_cast<int64_t>(copy.at[0]) + column;  // dims are a multiple of 8
      char chunk[16] = {};
      if (there && token >= 0 && token < map.sizes[1] && dim >= 0 && dim < map.sizes[0]) std::memcpy(chunk, from + dim * 2, 16);
      write(copy, dynamic_shared() + swizzled(base + static_cast<uint32_t>(row) * 128 + column * 2), chunk, 16);
    }
  }
}

void perform(const Copy& copy) {
  if (copy.bytes) write(copy, copy.to, copy.bytes, static_cast<size_t>(copy.size));
  else write_panel(copy);
  State& state = *copy.state;
  state.bytes -= copy.size;
  races::join(state.gathered, copy.knows);
  races::raise(state.gathered, state.agent, copy.when);
  end_if_complete(state);
}

}  // namespace

void begin(size_t threads) {
  barriers.clear();
  copies.clear();
  for (Named& each : named) each = Named();
  products::begin(threads);
}

bool step() {
  const size_t products = products::ready();
  if (copies.empty() && !products) return false;
  const size_t choice = random_below(copies.size() + products);
  if (choice >= copies.size()) return products::perform(choice - copies.size()), true;
  const Copy copy = copies[choice];
  copies[choice] = copies.back();
  copies.pop_back();
  perform(copy);
  return true;
}

void end() {
  if (!copies.empty()) fail("ends before its copies have come", nullptr, copies[0].thread);
  products::end();
}

}  // namespace host::async

namespace blip3o::hopper {

using namespace host;
using namespace host::async;

uint32_t shared_address(const void* p) {
  const ptrdiff_t place = static_cast<const char*>(p) - dynamic_shared();
  if (place < 0 || place >= 227 << 10) fail("takes as shared memory what is not dynamic shared memory", HERE);
  return static_cast<uint32_t>(place);
}

void init(Barrier* barrier, unsigned arrivals) {
  if (races::ON) races::access(barrier, sizeof *barrier, true, HERE);
  State state;
  state.count = state.pending = arrivals;
  state.initialiser = number();
  state.agent = barriers.size();
  if (state.agent + 8 >= races::AGENTS) fail("initialises more barriers than this model has room for", HERE);
  if (!barriers.emplace(barrier, state).second) fail("initialises a barrier again", HERE);
}

void fence_barriers() {
  for (auto& each : barriers)
    if (each.second.initialiser == number()) each.second.shown = true;
}

void arrive(Barrier* barrier) { arrive_at(state_of(barrier, HERE), HERE); }

void expect(Barrier* barrier, unsigned bytes) {
  State& state = state_of(barrier, HERE);
  state.bytes += static_cast<int>(bytes);
  arrive_at(state, HERE);
}

void wait(Barrier* barrier, unsigned parity) {
  State& state = state_of(barrier, HERE);
  while (state.parity == parity) wait_on(&state, "waits for a phase of a barrier that never ends", HERE);
  races::learn(number(), state.ended);
}

static void copy(Copy&& copy, Barrier* barrier, const void* code) {
  copy.state = &state_of(barrier, code);
  if (!copy.state->shown) fail("copies to a barrier that no fence has shown to TMA", code);
  copy.thread = number();
  copy.when = ++copy.state->copies;
  races::give(copy.knows, copy.thread);
  copies.push_back(std::move(copy));
}

void copy_panel(void* to, const TensorMap* map, Barrier* barrier, int dim, int token, int head, int batch) {
  if (shared_address(to) % 1024) fail("copies to where no panel can start", HERE);
  copy(Copy{static_cast<char*>(to), *map, nullptr, map->rows * 128, nullptr, {dim, token, head, batch}, 0, 0, {}}, barrier, HERE);
}

void copy_bytes(void* to, const void* from, unsigned bytes, Barrier* barrier) {
  const bool aligned = shared_address(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0 && bytes % 16 == 0;
  if (!aligned) fail("copies bytes that are not aligned to 16", HERE);
  copy(Copy{static_cast<char*>(to), {}, static_cast<const char*>(from), static_cast<int>(bytes), nullptr, {}, 0, 0, {}}, barrier, HERE);
}

static Named& come(int id, int threads, const void* code) {
  if (id < 1 || id > 15 || threads % 32) fail("uses a named barrier that there is not", code);
  Named& barrier = named[id];
  if (barrier.there && barrier.threads != threads) fail("comes to a named barrier with another number of threads", code);
  barrier.threads = threads;
  races::give(barrier.gathered, number());
  if (++barrier.there == threads) {
    barrier.there = 0;
    ++barrier.turn;
    barrier.ended = barrier.gathered;
    wake(&barrier);
  }
  return barrier;
}

void arrive_named(int id, int threads) { come(id, threads, HERE); }

void sync_named(int id, int threads) {
  const unsigned turn = named[id & 15].turn;
  Named& barrier = come(id, threads, HERE);
  while (barrier.turn == turn) wait_on(&barrier, "waits at a named barrier for threads that never come", HERE);
  races::learn(number(), barrier.ended);
}

}  // namespace blip3o::hopper
