// Calls of libunicorn 2, which is opened when it is asked for and never linked. A failed call of the library is
// -EINVAL, or -ENOMEM where it says so; what guest code did is no failure but an event.

#include "unicorn.h"

#include <uv.h>

#include <algorithm>
#include <cstring>

#include "calls.h"

namespace {

// Of Unicorn's ABI, the same in all versions of libunicorn.so.2: error numbers, kinds of hooks and memory accesses, and
// x86 instructions that have hooks.
constexpr int kOk = 0;
constexpr int kNoMemory = 1;
constexpr int kInvalidInstruction = 10;
constexpr int kHookInterrupt = 1 << 0;
constexpr int kHookInstruction = 1 << 1;
constexpr int kHookCode = 1 << 2;
constexpr int kHookMemoryInvalid = 0x3f << 4;
constexpr int kHookInvalid = 1 << 14;
constexpr int kReadUnmapped = 19;
constexpr int kWriteUnmapped = 20;
constexpr int kWriteProtected = 22;
constexpr int kReadProtected = 23;
constexpr int kArchX86 = 4;
constexpr int kInstructionIn = 218;
constexpr int kInstructionOut = 500;
// No register is longer.
constexpr size_t kRegister = 128;

using Uc = void*;

struct Library {
  int (*open)(int arch, int mode, Uc* uc);
  int (*close)(Uc uc);
  int (*reg_write)(Uc uc, int number, const void* value);
  int (*reg_read)(Uc uc, int number, void* value);
  int (*mem_write)(Uc uc, uint64_t address, const void* bytes, size_t size);
  int (*mem_read)(Uc uc, uint64_t address, void* bytes, size_t size);
  int (*mem_map)(Uc uc, uint64_t address, size_t size, uint32_t permissions);
  int (*mem_unmap)(Uc uc, uint64_t address, size_t size);
  int (*mem_protect)(Uc uc, uint64_t address, size_t size, uint32_t permissions);
  int (*emu_start)(Uc uc, uint64_t begin, uint64_t until, uint64_t timeout, size_t count);
  int (*emu_stop)(Uc uc);
  int (*hook_add)(Uc uc, size_t* hook, int type, void* callback, void* data, uint64_t begin, uint64_t end, ...);
};

template <typename Call>
bool Find(uv_lib_t* file, const char* name, Call* call) {
  return uv_dlsym(file, name, reinterpret_cast<void**>(call)) == 0;
}

bool FindAll(uv_lib_t* file, Library* library) {
  return Find(file, "uc_open", &library->open) && Find(file, "uc_close", &library->close) &&
         Find(file, "uc_reg_write", &library->reg_write) && Find(file, "uc_reg_read", &library->reg_read) &&
         Find(file, "uc_mem_write", &library->mem_write) && Find(file, "uc_mem_read", &library->mem_read) &&
         Find(file, "uc_mem_map", &library->mem_map) && Find(file, "uc_mem_unmap", &library->mem_unmap) &&
         Find(file, "uc_mem_protect", &library->mem_protect) && Find(file, "uc_emu_start", &library->emu_start) &&
         Find(file, "uc_emu_stop", &library->emu_stop) && Find(file, "uc_hook_add", &library->hook_add);
}

// Null where there is no library. Loaded once, and never unloaded.
const Library* Load() {
  static const Library* loaded = []() -> const Library* {
    static Library library;
    static uv_lib_t file;
    return uv_dlopen("libunicorn.so.2", &file) == 0 && FindAll(&file, &library) ? &library : nullptr;
  }();
  return loaded;
}

int64_t Result(int error) { return error == kOk ? 0 : error == kNoMemory ? -ENOMEM : -EINVAL; }

}  // namespace

// Why a run ended. TypeScript has the same numbers.
enum class Event : uint64_t { kNone, kRead, kWrite, kFetch, kIn, kOut, kInterrupt, kInvalid, kError };

class Engine {
 public:
  explicit Engine(const Library& library) : library_(library) {}
  ~Engine() {
    if (uc_ != nullptr) library_.close(uc_);
  }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  int64_t Open(int arch, int mode) {
    int error = library_.open(arch, mode, &uc_);
    if (error != kOk) {
      uc_ = nullptr;
      return Result(error);
    }
    error = Hook(kHookCode, reinterpret_cast<void*>(OnInstruction), 0);
    if (error == kOk) error = Hook(kHookMemoryInvalid, reinterpret_cast<void*>(OnMemory), 0);
    if (error == kOk) error = Hook(kHookInterrupt, reinterpret_cast<void*>(OnInterrupt), 0);
    if (error == kOk) error = Hook(kHookInvalid, reinterpret_cast<void*>(OnInvalid), 0);
    if (arch == kArchX86) {
      if (error == kOk) error = Hook(kHookInstruction, reinterpret_cast<void*>(OnIn), kInstructionIn);
      if (error == kOk) error = Hook(kHookInstruction, reinterpret_cast<void*>(OnOut), kInstructionOut);
    }
    return Result(error);
  }

  void Start(const Command& command) {
    event_ = Event::kNone;
    address_ = size_ = value_ = instructions_ = 0;
    last_ = next_ = command.u64(1);
    limit_ = command.u64(2);
    between_ = false;
    answered_ = command.u64(3) != 0;
    answer_ = command.u32(4);
    const int error = library_.emu_start(uc_, last_, UINT64_MAX, 0, 0);
    if (event_ == Event::kNone && error != kOk) {
      event_ = error == kInvalidInstruction ? Event::kInvalid : Event::kError;
      value_ = static_cast<uint64_t>(error);
    }
    command.Set(0, static_cast<uint64_t>(event_));
    command.Set(1, address_);
    command.Set(2, size_);
    command.Set(3, value_);
    command.Set(4, last_);
    command.Set(5, between_ ? 1 : 0);
    command.Set(6, next_);
  }

  const Library& library() const { return library_; }
  Uc uc() const { return uc_; }

 private:
  int Hook(int type, void* callback, int instruction) {
    size_t hook = 0;
    // An empty range is all addresses.
    return library_.hook_add(uc_, &hook, type, callback, this, 1, 0, instruction);
  }

  // The first event of a run counts.
  void Record(Event event, uint64_t address, uint64_t size, uint64_t value) {
    if (event_ != Event::kNone) return;
    event_ = event;
    address_ = address;
    size_ = size;
    value_ = value;
  }

  void Stop(Event event, uint64_t address, uint64_t size, uint64_t value) {
    Record(event, address, size, value);
    library_.emu_stop(uc_);
  }

  static void OnInstruction(Uc, uint64_t address, uint32_t, void* self) {
    Engine* engine = static_cast<Engine*>(self);
    if (engine->event_ != Event::kNone || engine->instructions_ == engine->limit_) {
      engine->between_ = true;
      engine->next_ = address;
      engine->library_.emu_stop(engine->uc_);
      return;
    }
    engine->last_ = address;
    engine->instructions_++;
  }

  static bool OnMemory(Uc, int type, uint64_t address, int size, int64_t value, void* self) {
    const Event event = type == kReadUnmapped || type == kReadProtected     ? Event::kRead
                        : type == kWriteUnmapped || type == kWriteProtected ? Event::kWrite
                                                                            : Event::kFetch;
    static_cast<Engine*>(self)->Stop(event, address, static_cast<uint64_t>(size), static_cast<uint64_t>(value));
    return false;
  }

  static void OnInterrupt(Uc, uint32_t number, void* self) {
    static_cast<Engine*>(self)->Stop(Event::kInterrupt, 0, 0, number);
  }

  static bool OnInvalid(Uc, void* self) {
    static_cast<Engine*>(self)->Stop(Event::kInvalid, 0, 0, 0);
    return false;
  }

  // Port accesses run to the end of their instruction: only the program counter of the next one is to be relied on.
  static uint32_t OnIn(Uc, uint32_t port, int size, void* self) {
    Engine* engine = static_cast<Engine*>(self);
    if (engine->answered_) {
      engine->answered_ = false;
      return engine->answer_;
    }
    engine->Record(Event::kIn, port, static_cast<uint64_t>(size), 0);
    return 0;
  }

  static void OnOut(Uc, uint32_t port, int size, uint32_t value, void* self) {
    static_cast<Engine*>(self)->Record(Event::kOut, port, static_cast<uint64_t>(size), value);
  }

  const Library& library_;
  Uc uc_ = nullptr;
  Event event_ = Event::kNone;
  uint64_t address_ = 0;
  uint64_t size_ = 0;
  uint64_t value_ = 0;
  uint64_t last_ = 0;
  uint64_t next_ = 0;
  uint64_t instructions_ = 0;
  uint64_t limit_ = 0;
  bool between_ = false;  // stopped before an instruction, the one at next_
  bool answered_ = false;
  uint32_t answer_ = 0;
};

Engines::Engines() = default;
Engines::~Engines() = default;

size_t Engines::Add(std::unique_ptr<Engine> engine) {
  const auto free = std::find(engines_.begin(), engines_.end(), nullptr);
  const size_t handle = static_cast<size_t>(free - engines_.begin());
  if (free == engines_.end()) {
    engines_.push_back(std::move(engine));
  } else {
    *free = std::move(engine);
  }
  return handle;
}

Engine* Engines::Find(uint64_t handle) const {
  return handle < engines_.size() ? engines_[static_cast<size_t>(handle)].get() : nullptr;
}

bool Engines::Remove(uint64_t handle) {
  if (Find(handle) == nullptr) return false;
  engines_[static_cast<size_t>(handle)] = nullptr;
  return true;
}

namespace {

// Whether the library is there: 0, or -ENOENT with nothing loaded.
int64_t UnicornLoad(Environment&) { return Load() == nullptr ? -ENOENT : 0; }

// uc_open, with a hook for each event; a handle. command: [arch, mode]
int64_t UnicornOpen(Environment& environment) {
  const Command& command = environment.command();
  const Library* library = Load();
  if (library == nullptr) return -ENOENT;
  auto engine = std::make_unique<Engine>(*library);
  const int64_t result = engine->Open(command.i32(0), command.i32(1));
  return result < 0 ? result : static_cast<int64_t>(environment.engines().Add(std::move(engine)));
}

// uc_close. command: [engine]
int64_t UnicornClose(Environment& environment) {
  return environment.engines().Remove(environment.command().u64(0)) ? 0 : -EBADF;
}

Engine* EngineOf(Environment& environment) { return environment.engines().Find(environment.command().u64(0)); }

// uc_mem_map: fresh memory. command: [engine, address, size, permissions]
int64_t UnicornMap(Environment& environment) {
  const Command& command = environment.command();
  const Engine* engine = EngineOf(environment);
  if (engine == nullptr) return -EBADF;
  return Result(engine->library().mem_map(engine->uc(), command.u64(1), command.u64(2), command.u32(3)));
}

// uc_mem_unmap. command: [engine, address, size]
int64_t UnicornUnmap(Environment& environment) {
  const Command& command = environment.command();
  const Engine* engine = EngineOf(environment);
  if (engine == nullptr) return -EBADF;
  return Result(engine->library().mem_unmap(engine->uc(), command.u64(1), command.u64(2)));
}

// uc_mem_protect. command: [engine, address, size, permissions]
int64_t UnicornProtect(Environment& environment) {
  const Command& command = environment.command();
  const Engine* engine = EngineOf(environment);
  if (engine == nullptr) return -EBADF;
  return Result(engine->library().mem_protect(engine->uc(), command.u64(1), command.u64(2), command.u32(3)));
}

// uc_mem_write. command: [engine, address]
int64_t UnicornWrite(Environment& environment, Bytes source) {
  const Engine* engine = EngineOf(environment);
  if (engine == nullptr) return -EBADF;
  return Result(engine->library().mem_write(engine->uc(), environment.command().u64(1), source.data, source.size));
}

// uc_mem_read. command: [engine, address]
int64_t UnicornRead(Environment& environment, Bytes target) {
  const Engine* engine = EngineOf(environment);
  if (engine == nullptr) return -EBADF;
  return Result(engine->library().mem_read(engine->uc(), environment.command().u64(1), target.data, target.size));
}

// uc_reg_write. command: [engine, register]
int64_t UnicornSetRegister(Environment& environment, Bytes value) {
  const Engine* engine = EngineOf(environment);
  if (engine == nullptr) return -EBADF;
  uint8_t copy[kRegister] = {};
  if (value.size > 0) std::memcpy(copy, value.data, std::min(value.size, kRegister));
  return Result(engine->library().reg_write(engine->uc(), environment.command().i32(1), copy));
}

// uc_reg_read; `value` also says which one, where the register is one of many. command: [engine, register]
int64_t UnicornGetRegister(Environment& environment, Bytes value) {
  const Engine* engine = EngineOf(environment);
  if (engine == nullptr) return -EBADF;
  const size_t size = std::min(value.size, kRegister);
  uint8_t copy[kRegister] = {};
  if (size > 0) std::memcpy(copy, value.data, size);
  const int64_t result = Result(engine->library().reg_read(engine->uc(), environment.command().i32(1), copy));
  if (size > 0) std::memcpy(value.data, copy, size);
  return result;
}

// uc_emu_start, until the first event. command: [engine, pc, instructions, is there an answer to `in`, that answer];
// then words: [event, address or port, size, value, pc of the last instruction, did it stop between two, pc of the
// next]
int64_t UnicornStart(Environment& environment) {
  Engine* engine = EngineOf(environment);
  if (engine == nullptr) return -EBADF;
  engine->Start(environment.command());
  return 0;
}

constexpr Function kTable[] = {
    {"unicornLoad", Invoke<UnicornLoad>},
    {"unicornOpen", Invoke<UnicornOpen>},
    {"unicornClose", Invoke<UnicornClose>},
    {"unicornMap", Invoke<UnicornMap>},
    {"unicornUnmap", Invoke<UnicornUnmap>},
    {"unicornProtect", Invoke<UnicornProtect>},
    {"unicornWrite", Invoke<UnicornWrite>},
    {"unicornRead", Invoke<UnicornRead>},
    {"unicornSetRegister", Invoke<UnicornSetRegister>},
    {"unicornGetRegister", Invoke<UnicornGetRegister>},
    {"unicornStart", Invoke<UnicornStart>},
};

}  // namespace

const Functions kUnicorn = kTable;
