#include "rows_on_disk.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace partinfer {
namespace {

constexpr int64_t SECTOR = 4096;       // direct reads begin and end at multiples of this
constexpr int64_t MOST_BYTES = 1 << 18;  // of a read, so that threads share a long stretch
constexpr float FADING = 1.0f / 0.98f;  // a choice counts half as much after 34 tokens
constexpr float KNOWN = 25.0f;          // what the best rank counts in the beginning: being chosen by half of the tokens
constexpr float LARGEST_WEIGHT = 1e15f;
constexpr int PROBES = 6;               // slots that are looked at for one to give up

int64_t down_to(int64_t value, int64_t step) { return value / step * step; }
int64_t up_to(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace

RowsOnDisk::RowsOnDisk(std::vector<std::string> paths, int64_t record, int64_t threads, int64_t gap)
    : record_(record), threads_(threads), gap_(std::max(gap, 2 * SECTOR)) {
  TORCH_CHECK_VALUE(record > 0 && record <= (1 << 26) && record % UNIT == 0, "a record must have a multiple of ", UNIT,
                    " bytes, got ", record);
  TORCH_CHECK_VALUE(threads > 0 && threads <= 64, "threads must be 1 to 64, got ", threads);
  TORCH_CHECK_VALUE(gap <= (1 << 26), "gap must be at most ", 1 << 26, " bytes, got ", gap);
  for (std::string& path : paths) {
    File file;
#ifdef O_DIRECT
    file.descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    file.direct = file.descriptor >= 0;
#endif
    if (file.descriptor < 0) file.descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file.descriptor < 0) {
      const int reason = errno;
      close_files();
      TORCH_CHECK_VALUE(false, path, " can't be read: ", std::strerror(reason));
    }
#ifdef POSIX_FADV_RANDOM
    if (!file.direct) posix_fadvise(file.descriptor, 0, 0, POSIX_FADV_RANDOM);
#endif
    file.path = std::move(path);
    files_.push_back(std::move(file));
  }
}

void RowsOnDisk::close_files() noexcept {
  for (const File& file : files_) close(file.descriptor);
  files_.clear();
}

RowsOnDisk::~RowsOnDisk() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : pool_) thread.join();
  if (memory_ != nullptr) munmap(memory_, memory_bytes_);
  close_files();
}

void RowsOnDisk::add_layer(int64_t file, int64_t start, int64_t rows, int64_t slots) {
  TORCH_CHECK_VALUE(memory_ == nullptr, "add_layer comes before load");
  TORCH_CHECK_VALUE(file >= 0 && file < int64_t(files_.size()), "there are ", files_.size(), " files, got number ", file);
  TORCH_CHECK_VALUE(rows > 0 && rows <= (1 << 24) && slots >= 0 && slots <= rows, "expected rows, and at most as many slots, got ", rows,
                    " and ", slots);
  TORCH_CHECK_VALUE(start >= 0 && start % UNIT == 0 && start < (int64_t(1) << 50), "a layer must begin at a multiple of ", UNIT,
                    " bytes, got ", start);
  Layer layer;
  layer.file = size_t(file);
  layer.start = start;
  layer.rows = rows;
  layer.slots = slots;
  layer.first_slot = layers_.empty() ? 0 : layers_.back().first_slot + layers_.back().slots;
  layer.slot_of.assign(size_t(rows), -1);
  layer.row_in.resize(size_t(slots));
  layer.score.resize(size_t(rows));
  for (int64_t i = 0; i < slots; ++i) layer.slot_of[size_t(i)] = layer.row_in[size_t(i)] = int32_t(i);
  for (int64_t i = 0; i < rows; ++i) layer.score[size_t(i)] = KNOWN * (1.0f - float(i) / float(rows));
  layers_.push_back(std::move(layer));
}

void RowsOnDisk::load() {
  TORCH_CHECK_VALUE(memory_ == nullptr && !layers_.empty(), "load comes once, after the layers");
  int64_t slots = 0, most = 0;
  for (const Layer& layer : layers_) {
    slots += layer.slots;
    most = std::max(most, layer.rows);
  }
  const int64_t held = up_to(slots * record_, SECTOR), all = most * record_;
  // Every read has up to two sectors more than its rows. Reads follow each other at more than a gap, or after MOST_BYTES.
  scratch_bytes_ = up_to(all, SECTOR) + (4 * (all / MOST_BYTES) + 8) * 2 * SECTOR;
  TORCH_CHECK_VALUE((held + scratch_bytes_) / UNIT < INT32_MAX, "rows of ", held, " bytes are too many for memory");
  memory_bytes_ = size_t(held + scratch_bytes_ + SECTOR);
  void* place = mmap(nullptr, memory_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(place != MAP_FAILED, "no memory for ", memory_bytes_, " bytes of rows: ", std::strerror(errno));
  memory_ = static_cast<char*>(place);
  scratch_ = memory_ + held;
#ifdef MADV_HUGEPAGE
  madvise(memory_, size_t(held), MADV_HUGEPAGE);
#endif
  done_size_ = size_t(scratch_bytes_ / SECTOR + 2);
  done_.reset(new std::atomic<uint8_t>[done_size_]);
  for (int64_t i = 0; i < threads_; ++i) pool_.emplace_back([this] { work(); });
  for (const Layer& layer : layers_)  // through the scratch, because slots don't begin where sectors do
    for (int64_t row = 0; row < layer.slots;) {
      const int64_t count = std::min(layer.slots - row, std::max<int64_t>(1, (16 * MOST_BYTES) / record_));
      requests_.clear();
      const int64_t begin = layer.start + row * record_, first = down_to(begin, SECTOR);
      const int64_t fits = std::min(count, (scratch_bytes_ - 2 * SECTOR) / record_);
      const int64_t last = begin + fits * record_;
      for (int64_t from = first; from < last; from += MOST_BYTES)
        add_request(layer.file, from, std::min(last, from + MOST_BYTES), scratch_ + (from - first), 0, 0);
      submit(1, 1);
      wait_for_all();
      check_read();
      std::memcpy(memory_ + (layer.first_slot + row) * record_, scratch_ + (begin - first), size_t(fits * record_));
      row += fits;
    }
  bytes_read_ = 0;
}

int64_t RowsOnDisk::rows(int64_t layer) const { return layer_at(layer).rows; }

const char* RowsOnDisk::memory() const {
  TORCH_CHECK_VALUE(memory_ != nullptr, "load comes first");
  return memory_;
}

const RowsOnDisk::Layer& RowsOnDisk::layer_at(int64_t number) const {
  TORCH_CHECK_VALUE(number >= 0 && number < int64_t(layers_.size()), "there are ", layers_.size(),
                    " layers of rows, got number ", number);
  return layers_[size_t(number)];
}

at::Tensor RowsOnDisk::take_counts() {
  at::Tensor counts = at::empty({4}, at::TensorOptions().dtype(at::kLong));
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  out[0] = chosen_;
  out[1] = found_;
  out[2] = bytes_read_.exchange(0);
  out[3] = reads_;
  chosen_ = found_ = reads_ = 0;
  return counts;
}

// The bytes [from, to) of the file, where whole sectors around them are read. into: where the sector of `from` goes.
void RowsOnDisk::add_request(size_t file, int64_t from, int64_t to, char* into, int64_t first, int64_t last) {
  const int64_t begin = down_to(from, SECTOR);
  requests_.push_back({file, begin, up_to(to, SECTOR) - begin, to - begin, into, first, last});
}

at::Tensor RowsOnDisk::view(int64_t number) {
  const Layer& layer = layer_at(number);
  memory();
  // the tensor keeps this alive
  auto self = c10::intrusive_ptr<RowsOnDisk>::reclaim_copy(this);
  return at::from_blob(scratch_ + layer.start % SECTOR, {layer.rows, record_}, [self](void*) {},
                       at::TensorOptions().dtype(at::kByte));
}

void RowsOnDisk::fetch(int64_t number) {
  const Layer& layer = layer_at(number);
  memory();
  const int64_t first = down_to(layer.start, SECTOR);
  const auto in_memory = [&](int64_t row) { return layer.slot_of[size_t(row)] >= 0; };
  requests_.clear();
  // What lies around a stretch is written over with what it is: the scratch is laid out like the file.
  for (int64_t row = 0; row < layer.rows;) {
    if (in_memory(row)) {
      ++row;
      continue;
    }
    int64_t stop = row + 1, seen = stop;
    while (seen < layer.rows && (seen - stop) * record_ <= gap_ && (seen - row) * record_ < MOST_BYTES)
      if (!in_memory(seen++)) stop = seen;
    const int64_t from = layer.start + row * record_;
    add_request(layer.file, from, layer.start + stop * record_, scratch_ + (down_to(from, SECTOR) - first), 0, 0);
    row = stop;
  }
  submit(1, 1);
  wait_for_all();
  check_read();
  char* out = scratch_ + (layer.start - first);
  for (int64_t slot = 0; slot < layer.slots; ++slot)
    std::memcpy(out + layer.row_in[size_t(slot)] * record_, memory_ + (layer.first_slot + slot) * record_, size_t(record_));
}

void RowsOnDisk::begin(int64_t number, int32_t* rows, int64_t count, int workers) noexcept {
  Layer& layer = layers_[size_t(number)];
  const int64_t units = record_ / UNIT;
  misses_.clear();
  requests_.clear();
  scratch_used_ = 0;
  for (int64_t position = 0; position < count; ++position) {
    const int32_t row = rows[position], slot = layer.slot_of[size_t(row)];
    layer.score[size_t(row)] += layer.weight;
    if (slot >= 0)
      rows[position] = int32_t((layer.first_slot + slot) * units);
    else
      misses_.push_back({row, int32_t(position), 0});
  }
  chosen_ += count;
  found_ += count - int64_t(misses_.size());
  const auto by_row = [](const Miss& one, const Miss& other) { return one.row < other.row; };
  in_order_ = std::is_sorted(misses_.begin(), misses_.end(), by_row);
  if (!in_order_) std::sort(misses_.begin(), misses_.end(), by_row);
  merge_misses(layer);
  for (const Miss& miss : misses_) rows[miss.position] = int32_t(miss.unit);
  if (!requests_.empty()) submit(workers, count);
}

// Reads for the missing rows, which are in the order of the file, one after the other in the scratch.
void RowsOnDisk::merge_misses(const Layer& layer) {
  for (size_t i = 0; i < misses_.size();) {
    const int64_t first_row = misses_[i].row;
    size_t stop = i + 1;
    while (stop < misses_.size() && (misses_[stop].row - misses_[stop - 1].row - 1) * record_ <= gap_ &&
           (misses_[stop].row + 1 - first_row) * record_ <= std::max(MOST_BYTES, record_))
      ++stop;
    const int64_t from = layer.start + first_row * record_, begin = down_to(from, SECTOR);
    const int64_t to = layer.start + (misses_[stop - 1].row + 1) * record_;
    char* into = scratch_ + scratch_used_;
    if (scratch_used_ + up_to(to, SECTOR) - begin > scratch_bytes_) {  // can't be, see `load`
      const std::lock_guard<std::mutex> lock(mutex_);
      failed_ = files_[layer.file].path + " can't be read: there is no room for its rows";
      return;
    }
    add_request(layer.file, from, to, into, misses_[i].position, misses_[stop - 1].position);
    for (; i < stop; ++i) misses_[i].unit = (into + (layer.start + misses_[i].row * record_ - begin) - memory_) / UNIT;
    scratch_used_ += requests_.back().bytes;
  }
}

void RowsOnDisk::submit(int workers, int64_t count) {
  // Every worker computes a stretch of the positions: what each of them needs first is read first.
  std::vector<size_t> heads(size_t(workers), 0), ends(size_t(workers), 0);
  size_t request = 0;
  for (int worker = 0; worker < workers; ++worker) {
    heads[size_t(worker)] = request;
    while (request < requests_.size() &&
           (worker + 1 == workers || requests_[request].first < (worker + 1) * count / workers))
      ++request;  // any share will do where positions don't ascend
    ends[size_t(worker)] = request;
  }
  order_.clear();
  while (order_.size() < requests_.size())
    for (int worker = 0; worker < workers; ++worker)
      if (heads[size_t(worker)] < ends[size_t(worker)]) order_.push_back(heads[size_t(worker)]++);
  for (size_t i = 0; i < requests_.size(); ++i) done_[i].store(0, std::memory_order_relaxed);
  reads_ += int64_t(requests_.size());
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    next_ = 0;
    total_ = requests_.size();
  }
  wake_.notify_all();
}

void RowsOnDisk::work() noexcept {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stop_ || next_ < total_; });
    if (stop_) return;
    const size_t request = order_[next_++];
    lock.unlock();
    read(requests_[request]);
    lock.lock();
    done_[request].store(1, std::memory_order_release);
    if (waiting_ > 0) arrived_.notify_all();
  }
}

void RowsOnDisk::read(const Request& request) noexcept {
  const File& file = files_[request.file];
  int64_t done = 0;
  while (done < request.needed) {
    const ssize_t count =
        pread(file.descriptor, request.into + done, size_t(request.bytes - done), request.from + done);
    if (count < 0 && errno == EINTR) continue;
    // a direct read ends in the middle of a sector only where the file ends
    if (count <= 0 || (file.direct && count % SECTOR != 0 && done + count < request.needed)) {
      const char* reason = count < 0 ? std::strerror(errno) : "it ends too early";
      const std::lock_guard<std::mutex> lock(mutex_);
      if (failed_.empty()) failed_ = file.path + " can't be read: " + reason;
      return;
    }
    done += count;
  }
  bytes_read_.fetch_add(request.bytes, std::memory_order_relaxed);
#ifdef POSIX_FADV_DONTNEED
  if (!file.direct) posix_fadvise(file.descriptor, request.from, request.bytes, POSIX_FADV_DONTNEED);
#endif
}

void RowsOnDisk::wait_for(size_t request) noexcept {
  if (done_[request].load(std::memory_order_acquire)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  ++waiting_;
  arrived_.wait(lock, [&] { return done_[request].load(std::memory_order_relaxed) != 0; });
  --waiting_;
}

void RowsOnDisk::wait_for_all() noexcept {
  for (size_t i = 0; i < requests_.size(); ++i) wait_for(i);
}

void RowsOnDisk::wait(int64_t begin, int64_t end) noexcept {
  if (!in_order_) return wait_for_all();
  auto request = std::partition_point(requests_.begin(), requests_.end(), [&](const Request& one) { return one.last < begin; });
  for (; request != requests_.end() && request->first < end; ++request) wait_for(size_t(request - requests_.begin()));
}

void RowsOnDisk::check_read() {
  if (failed_.empty()) return;
  std::string failed;
  failed.swap(failed_);
  TORCH_CHECK_VALUE(false, failed, "; make the pack again");
}

void RowsOnDisk::end(int64_t number) {
  wait_for_all();
  check_read();
  Layer& layer = layers_[size_t(number)];
  admit(layer);
  layer.weight *= FADING;
  if (layer.weight > LARGEST_WEIGHT) {
    for (float& score : layer.score) score /= layer.weight;
    layer.weight = 1.0f;
  }
}

// Rows that were read take the places of rows with lower scores, as far as a few probes find such.
void RowsOnDisk::admit(Layer& layer) {
  if (layer.slots == 0) return;
  for (const Miss& miss : misses_) {
    int32_t worst = 0;
    float lowest = layer.score[size_t(miss.row)];
    bool found = false;
    for (int probe = 0; probe < PROBES; ++probe) {
      random_ = random_ * 1664525u + 1013904223u;
      const int32_t slot = int32_t((uint64_t(random_) * uint64_t(layer.slots)) >> 32);
      const float score = layer.score[size_t(layer.row_in[size_t(slot)])];
      if (score < lowest) {
        lowest = score;
        worst = slot;
        found = true;
      }
    }
    if (!found) continue;
    layer.slot_of[size_t(layer.row_in[size_t(worst)])] = -1;
    layer.slot_of[size_t(miss.row)] = worst;
    layer.row_in[size_t(worst)] = miss.row;
    std::memcpy(memory_ + (layer.first_slot + worst) * record_, memory_ + miss.unit * UNIT, size_t(record_));
  }
}

}  // namespace partinfer
