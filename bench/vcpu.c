// The other side of vcpu.ts: the same guest, run by a C loop in a process with as many threads.
//
// vcpu <idle threads>
// It reads lines "port-io <exits>" and answers each with the nanoseconds that all exits took, or with -errno.

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { MEMORY = 1 << 20, ENTRY = 0x1000, DEADLINE = 10 };

static int vcpu;
static struct kvm_run* run;

static long now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000l + time.tv_nsec;
}

static int exits(long count) {
  for (long i = 0; i < count; i++) {
    if (ioctl(vcpu, KVM_RUN, 0) < 0) return -errno;
    if (run->exit_reason != KVM_EXIT_IO) return -EPROTO;
  }
  return 0;
}

static long measure(long count) {
  int result = exits(count / 4 + 1);
  const long start = now();
  if (result == 0) result = exits(count);
  return result < 0 ? result : now() - start;
}

static void* idle(void* unused) {
  for (;;) pause();
  return unused;
}

static void interrupt(int signal) { (void)signal; }

// A guest that never comes back is interrupted.
static int set_deadline(void) {
  const struct sigaction action = {.sa_handler = interrupt};
  const struct itimerval timer = {.it_interval = {.tv_sec = DEADLINE}, .it_value = {.tv_sec = DEADLINE}};
  return sigaction(SIGALRM, &action, NULL) < 0 || setitimer(ITIMER_REAL, &timer, NULL) < 0;
}

static int create_guest(void) {
  const int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  const int vm = ioctl(kvm, KVM_CREATE_VM, 0);
  uint8_t* memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (kvm < 0 || vm < 0 || memory == MAP_FAILED) return -1;
  // next: out 0x80, al; jmp next
  memcpy(memory + ENTRY, "\xe6\x80\xeb\xfc", 4);
  struct kvm_userspace_memory_region region = {.memory_size = MEMORY, .userspace_addr = (uint64_t)memory};
  if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0) return -1;
  vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
  const int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
  if (vcpu < 0 || size < 0) return -1;
  run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  if (run == MAP_FAILED) return -1;
  struct kvm_sregs system;
  if (ioctl(vcpu, KVM_GET_SREGS, &system) < 0) return -1;
  system.cs.base = system.cs.selector = 0;
  const struct kvm_regs general = {.rip = ENTRY, .rflags = 2};
  return ioctl(vcpu, KVM_SET_SREGS, &system) < 0 || ioctl(vcpu, KVM_SET_REGS, &general) < 0;
}

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  // Before the other threads: the signal is for this one.
  sigset_t alarms;
  sigemptyset(&alarms);
  sigaddset(&alarms, SIGALRM);
  pthread_sigmask(SIG_BLOCK, &alarms, NULL);
  for (int i = atoi(argv[1]); i > 0; i--) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, idle, NULL) != 0) return 1;
  }
  pthread_sigmask(SIG_UNBLOCK, &alarms, NULL);
  if (create_guest() != 0 || set_deadline() != 0) {
    perror("vcpu");
    return 1;
  }

  long count;
  while (scanf(" port-io %ld", &count) == 1) {
    printf("%ld\n", measure(count));
    fflush(stdout);
  }
  return 0;
}
