// What a kernel reads and writes while its PTX is interpreted: checked, counted, watched for races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

namespace gpu {

struct Range {
  const char* name;
  uint64_t begin, end;
};

struct Traffic {
  uint64_t bytes_read, bytes_written, sectors_read, sectors_written;
};

// kPrivate are a thread's own variables and the parameters; kGeneric is global or shared.
enum class Space { kGlobal, kShared, kPrivate, kGeneric };

// How many barriers a thread has passed, with the whole block and with its warp.
struct Progress {
  uint32_t block = 0, warp = 0;
};

class Memory {
 public:
  // Global memory is `ranges`, or unchecked where there are none.
  Memory(std::vector<Range> ranges, size_t shared_bytes);

  void begin_block();
  void read(Space space, uint64_t address, void* to, unsigned bytes, int line);
  void write(Space space, uint64_t address, const void* from, unsigned bytes, int line);
  // For a read and write in one.
  char* atomic(Space space, uint64_t address, unsigned bytes, int line);
  Traffic traffic() const;

  std::vector<Progress> progress;  // of each thread of the block

 private:
  // Who touched a byte last, and how far that thread was.
  struct Touch {
    int thread = -1;
    Progress progress;
  };
  struct Touches {
    Touch write, read;
    bool by_other_threads = false, by_other_warps = false;  // reads before the last, of one phase
  };

  char* reach(Space& space, uint64_t address, unsigned bytes, int line, const char* what) const;
  void check_range(uint64_t address, unsigned bytes, int line, const char* what) const;
  bool ordered(const Touch& earlier) const;
  void watch_read(uint64_t address, unsigned bytes, int line);
  void watch_write(uint64_t address, const void* from, unsigned bytes, int line);

  std::vector<Range> ranges_;
  std::vector<Touches> touches_;
  uint64_t bytes_read_ = 0, bytes_written_ = 0;
  std::unordered_set<uint64_t> sectors_read_, sectors_written_;
};

}  // namespace gpu
