// The rows of gate and down of a model's layers, of which some are in memory and the others are read from a file when a
// token has chosen them.
//
// A record is what a neuron has there: its row of gate and its row of down, then their scales, padded to whole units. A
// layer's records follow each other. In memory there are slots for some of each layer's records: in the beginning its
// first ones, later those that were chosen often and lately (a sum that fades, as LRFU has it: Lee et al., 2001). What is
// missing is read in stretches that leave out only gaps that take longer to skip than to read. It goes past the page
// cache, which would hold it a second time, where the file system can do that.
#pragma once

#include <torch/custom_class.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fetch.h"
#include "types.h"

namespace partinfer {

class RowsOnDisk : public torch::CustomClassHolder, public Fetch {
 public:
  // record: bytes; a multiple of UNIT. gap: bytes between rows that are read rather than skipped.
  RowsOnDisk(std::vector<std::string> paths, int64_t record, int64_t threads, int64_t gap);
  ~RowsOnDisk() override;

  // The next layer: `rows` records from byte `start` of a file on (a multiple of UNIT), `slots` of them in memory.
  void add_layer(int64_t file, int64_t start, int64_t rows, int64_t slots);
  // After the last layer: takes the memory, and reads the first records of every layer into its slots.
  void load();
  // Where `fetch` puts a layer's records: uint8 [rows, record], in memory that is used for every layer and token.
  at::Tensor view(int64_t layer);
  // Reads all records of a layer.
  void fetch(int64_t layer);
  // Since this was last called: rows chosen, those of them that were in memory, bytes read and reads. int64 [4].
  at::Tensor take_counts();
  int64_t bytes_in_memory() const { return int64_t(memory_bytes_); }

  int64_t record() const { return record_; }
  int64_t rows(int64_t layer) const;
  const char* memory() const;  // where units are counted from

  void begin(int64_t layer, int32_t* rows, int64_t count, int workers) noexcept override;
  void wait(int64_t begin, int64_t end) noexcept override;
  void end(int64_t layer) override;

 private:
  struct File {
    std::string path;
    int descriptor = -1;
    bool direct = false;
  };
  struct Layer {
    size_t file = 0;
    int64_t start = 0, rows = 0, slots = 0, first_slot = 0;
    std::vector<int32_t> slot_of;  // [rows], -1: not in memory
    std::vector<int32_t> row_in;   // [slots]
    std::vector<float> score;      // [rows]
    float weight = 1.0f;           // what being chosen now adds to a score
  };
  struct Miss {
    int32_t row, position;
    int64_t unit;
  };
  struct Request {
    size_t file;
    int64_t from, bytes;  // of the file
    int64_t needed;       // how many of the bytes must be there
    char* into;
    int64_t first, last;  // positions that need it
  };

  const Layer& layer_at(int64_t number) const;
  void add_request(size_t file, int64_t from, int64_t to, char* into, int64_t first, int64_t last);
  void merge_misses(const Layer& layer);
  void submit(int workers, int64_t count);
  void wait_for(size_t request) noexcept;
  void wait_for_all() noexcept;
  void check_read();
  void work() noexcept;
  void read(const Request& request) noexcept;
  void close_files() noexcept;
  void admit(Layer& layer);

  const int64_t record_, threads_, gap_;
  std::vector<File> files_;
  std::vector<Layer> layers_;
  char* memory_ = nullptr;  // all slots, then what is read for one layer
  size_t memory_bytes_ = 0;
  char* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0, scratch_used_ = 0;

  std::vector<Miss> misses_;
  bool in_order_ = true;  // whether positions of misses ascend with their rows
  std::vector<Request> requests_;
  std::vector<size_t> order_;
  std::unique_ptr<std::atomic<uint8_t>[]> done_;
  size_t done_size_ = 0;
  uint32_t random_ = 1;
  std::atomic<int64_t> bytes_read_{0};
  int64_t chosen_ = 0, found_ = 0, reads_ = 0;

  std::mutex mutex_;
  std::condition_variable wake_, arrived_;
  size_t next_ = 0, total_ = 0;
  int waiting_ = 0;
  bool stop_ = false;
  std::string failed_;  // which file, and what was wrong with a read
  std::vector<std::thread> pool_;
};

}  // namespace partinfer
