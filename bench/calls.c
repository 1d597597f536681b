// The other side of calls.ts: the same system calls in a C loop, made by a process with as many threads, because an
// ioctl costs more where the table of file descriptors is shared.
//
// calls <idle threads> <guest_memfd flags>
// It reads lines "<case> <rounds>" and answers each with the nanoseconds that all rounds took, or with -errno.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

// Older <linux/kvm.h> lack half of these.
enum { KEEP_SIZE = 1, PUNCH_HOLE = 2, GUEST_MEMFD = 4, USER_MEMORY = 3 };
enum { PAGE = 4096, SLOT_SIZE = 1 << 20 };
#define CREATE_VM 0xae01ul
#define CHECK_EXTENSION 0xae03ul
#define SET_USER_MEMORY_REGION 0x4020ae46ul
#define SET_USER_MEMORY_REGION2 0x40a0ae49ul
#define CREATE_GUEST_MEMFD 0xc040aed4ul

struct region {
  uint32_t slot, flags;
  uint64_t guest_phys_addr, memory_size, userspace_addr;
};
struct region2 {
  struct region region;
  uint64_t guest_memfd_offset;
  uint32_t guest_memfd, pad1;
  uint64_t pad2[14];
};
struct create_guest_memfd {
  uint64_t size, flags, reserved[6];
};

static int vm, file;
static uint64_t memory, window;

static int check_extension(void) { return ioctl(vm, CHECK_EXTENSION, USER_MEMORY); }

static int punch(void) { return fallocate(file, PUNCH_HOLE | KEEP_SIZE, 0, PAGE); }

static int allocate_and_punch(void) {
  if (fallocate(file, KEEP_SIZE, 0, PAGE) < 0) return -1;
  return punch();
}

static int remove_slot(void) {
  struct region region = {0};
  return ioctl(vm, SET_USER_MEMORY_REGION, &region);
}

static int plain_slot(void) {
  struct region region = {.memory_size = SLOT_SIZE, .userspace_addr = memory};
  if (ioctl(vm, SET_USER_MEMORY_REGION, &region) < 0) return -1;
  return remove_slot();
}

static int guest_memfd_slot(void) {
  struct region2 region = {
      .region = {.flags = GUEST_MEMFD, .memory_size = SLOT_SIZE, .userspace_addr = window},
      .guest_memfd = (uint32_t)file,
  };
  if (ioctl(vm, SET_USER_MEMORY_REGION2, &region) < 0) return -1;
  return remove_slot();
}

static const struct {
  const char* name;
  int (*call)(void);
} cases[] = {
    {"check-extension", check_extension}, {"punch", punch},
    {"allocate-punch", allocate_and_punch}, {"plain-slot", plain_slot},
    {"guest-memfd-slot", guest_memfd_slot},
};

static long now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000l + time.tv_nsec;
}

static long measure(int (*call)(void), long rounds) {
  for (long i = 0; i < rounds / 4 + 1; i++) {
    if (call() < 0) return -errno;
  }
  const long start = now();
  for (long i = 0; i < rounds; i++) call();
  return now() - start;
}

static void* idle(void* unused) {
  for (;;) pause();
  return unused;
}

static uint64_t map(int flags, int fd) {
  void* address = mmap(NULL, SLOT_SIZE, PROT_READ | PROT_WRITE, flags, fd, 0);
  return address == MAP_FAILED ? 0 : (uint64_t)address;
}

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  vm = ioctl(kvm, CREATE_VM, 0);
  if (kvm < 0 || vm < 0) return 1;
  struct create_guest_memfd create = {.size = SLOT_SIZE, .flags = strtoul(argv[2], NULL, 0)};
  file = ioctl(vm, CREATE_GUEST_MEMFD, &create);
  memory = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
  window = create.flags ? map(MAP_SHARED, file) : 0;
  for (int i = atoi(argv[1]); i > 0; i--) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, idle, NULL) != 0) return 1;
  }

  char name[32];
  long rounds;
  while (scanf("%31s %ld", name, &rounds) == 2) {
    long result = -EINVAL;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
      if (strcmp(cases[i].name, name) == 0) result = measure(cases[i].call, rounds);
    }
    printf("%ld\n", result);
    fflush(stdout);
  }
  return 0;
}
