#include "ptx_memory.h"

#include <cstring>
#include <utility>

#include "fibers.h"

namespace gpu {
namespace {

constexpr unsigned kSector = 32;  // the least that a GPU moves

void count_sectors(uint64_t address, unsigned bytes, std::unordered_set<uint64_t>& sectors) {
  for (uint64_t s = address / kSector; s <= (address + bytes - 1) / kSector; ++s) sectors.insert(s);
}

}  // namespace

Memory::Memory(std::vector<Range> ranges, size_t shared_bytes)
    : ranges_(std::move(ranges)), touches_(shared_bytes) {}

void Memory::begin_block() {
  touches_.assign(touches_.size(), {});
  progress.assign(progress.size(), {});
}

char* Memory::reach(Space& space, uint64_t address, unsigned bytes, int line,
                    const char* what) const {
  const uint64_t base = reinterpret_cast<uint64_t>(block->shared);
  if (space == Space::kGeneric) {
    const bool inside = address >= base && address < base + touches_.size();
    space = inside ? Space::kShared : Space::kGlobal;
    if (inside) address -= base;
  }
  if (address % bytes != 0) {
    fail("line %d: %s of %u bytes at an address that is no multiple of that", line, what, bytes);
  }
  if (space == Space::kShared) {
    if (address + bytes > touches_.size()) {
      fail("line %d: out of bounds: %s of %u bytes at byte %llu of %zu of shared memory", line,
           what, bytes, static_cast<unsigned long long>(address), touches_.size());
    }
    address += base;
  } else if (space == Space::kGlobal) {
    check_range(address, bytes, line, what);
  }
  return reinterpret_cast<char*>(address);
}

void Memory::check_range(uint64_t address, unsigned bytes, int line, const char* what) const {
  const Range* nearest = nullptr;
  const auto beyond = [&](const Range& range) {
    return address < range.begin         ? range.begin - address
           : address + bytes > range.end ? address + bytes - range.end
                                         : 0;
  };
  for (const Range& range : ranges_) {
    if (beyond(range) == 0) return;
    if (!nearest || beyond(range) < beyond(*nearest)) nearest = &range;
  }
  if (!nearest) return;
  fail("line %d: out of bounds: %s of %u bytes, %llu bytes %s '%s'", line, what, bytes,
       static_cast<unsigned long long>(beyond(*nearest)),
       address < nearest->begin ? "before" : "past the end of", nearest->name);
}

void Memory::read(Space space, uint64_t address, void* to, unsigned bytes, int line) {
  const char* from = reach(space, address, bytes, line, "read");
  if (space == Space::kGlobal) {
    bytes_read_ += bytes;
    count_sectors(reinterpret_cast<uint64_t>(from), bytes, sectors_read_);
  } else if (space == Space::kShared) {
    watch_read(uint64_t(from - block->shared), bytes, line);
  }
  memcpy(to, from, bytes);
}

void Memory::write(Space space, uint64_t address, const void* from, unsigned bytes, int line) {
  char* to = reach(space, address, bytes, line, "write");
  if (space == Space::kGlobal) {
    bytes_written_ += bytes;
    count_sectors(reinterpret_cast<uint64_t>(to), bytes, sectors_written_);
  } else if (space == Space::kShared) {
    watch_write(uint64_t(to - block->shared), from, bytes, line);
  }
  memcpy(to, from, bytes);
}

char* Memory::atomic(Space space, uint64_t address, unsigned bytes, int line) {
  char* at = reach(space, address, bytes, line, "atomic");
  if (space == Space::kGlobal) {
    bytes_read_ += bytes;
    bytes_written_ += bytes;
    count_sectors(reinterpret_cast<uint64_t>(at), bytes, sectors_read_);
    count_sectors(reinterpret_cast<uint64_t>(at), bytes, sectors_written_);
  }
  return at;
}

Traffic Memory::traffic() const {
  return {bytes_read_, bytes_written_, sectors_read_.size(), sectors_written_.size()};
}

bool Memory::ordered(const Touch& earlier) const {
  const Progress& now = progress[thread->number];
  const bool same_warp = earlier.thread / 32 == thread->warp();
  return earlier.thread < 0 || earlier.thread == thread->number ||
         earlier.progress.block < now.block || (same_warp && earlier.progress.warp < now.warp);
}

void Memory::watch_read(uint64_t address, unsigned bytes, int line) {
  const Touch now{thread->number, progress[thread->number]};
  for (uint64_t i = address; i < address + bytes; ++i) {
    Touches& touches = touches_[i];
    if (!ordered(touches.write)) {
      fail(
          "line %d: a race: reads byte %llu of shared memory that thread %d writes, with no "
          "barrier between them",
          line, static_cast<unsigned long long>(i), touches.write.thread);
    }
    const Touch& before = touches.read;
    const bool same_phase = before.thread >= 0 && before.progress.block == now.progress.block;
    const bool other_warp = before.thread / 32 != now.thread / 32;
    touches.by_other_warps = same_phase && (touches.by_other_warps || other_warp);
    touches.by_other_threads = same_phase && before.progress.warp == now.progress.warp &&
                               (touches.by_other_threads || before.thread != now.thread);
    touches.read = now;
  }
}

void Memory::watch_write(uint64_t address, const void* from, unsigned bytes, int line) {
  const Touch now{thread->number, progress[thread->number]};
  // Threads may write one and the same value; Triton's do.
  const bool changes = memcmp(block->shared + address, from, bytes) != 0;
  for (uint64_t i = address; i < address + bytes; ++i) {
    Touches& touches = touches_[i];
    const Touch& read = touches.read;
    const bool same_phase = read.thread >= 0 && read.progress.block == now.progress.block;
    const bool read_by_another =
        !ordered(read) || (same_phase && touches.by_other_warps) ||
        (same_phase && read.progress.warp == now.progress.warp && touches.by_other_threads);
    if (changes && (!ordered(touches.write) || read_by_another)) {
      fail(
          "line %d: a race: writes byte %llu of shared memory that another thread %s, with no "
          "barrier between them",
          line, static_cast<unsigned long long>(i), read_by_another ? "reads" : "writes");
    }
    touches.write = now;
  }
}

}  // namespace gpu
