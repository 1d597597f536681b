import {
  F_GETFL,
  MADV_DONTNEED,
  MADV_HWPOISON,
  MADV_REMOVE,
  MADV_SOFT_OFFLINE,
  MAP_ANONYMOUS,
  MAP_FIXED,
  MAP_PRIVATE,
  MLOCK_ONFAULT,
  O_CLOEXEC,
  O_RDWR,
  PROT_READ,
  RLIMIT_MEMLOCK,
  SEEK_SET,
} from '../../../lib/uapi.ts';
import { gmemSlots, mappable, separateWindows, shareable, swProtected } from '../needs.ts';
import { INIT_SHARED, MMAP, type Outcome, type Scenario, scenario, section } from '../scenario.ts';

/** What was thrown, by name. */
const thrown = (call: () => unknown): Outcome => {
  try {
    return `nothing: ${call()}`;
  } catch (error) {
    return error instanceof TypeError ? 'TypeError' : String(error);
  }
};
const wrong = <T>(value: unknown): T => value as T;
const shared = (s: Scenario) => s.gmem(s.vm(), 16, MMAP | INIT_SHARED);

export const boundary = section('The boundary itself', [
  scenario('boundary fds', 'an fd that this kernel did not open is EBADF', {
    when: (s) =>
      [0, 1, 2, -1, 99999].flatMap((fd) => [
        s.kernel.fallocate(fd, 3, 0, s.P),
        s.kernel.fstat(fd, {}),
        s.kernel.ftruncate(fd, 0),
        s.kernel.read(fd, new Uint8Array(1)),
        s.kernel.write(fd, new Uint8Array(1)),
        s.kernel.dup(fd),
        s.kernel.ioctl(fd, 0xae00, 0),
        s.kernel.checkExtension(fd, 3),
        s.kernel.fcntlGetFd(fd),
        s.kernel.fcntl(fd, F_GETFL, 0),
        s.kernel.fsync(fd),
        s.kernel.fstatfs(fd, {}),
        s.kernel.cachestat(fd, 0, 0, {}),
        s.kernel.lseek(fd, 0, 0),
        s.kernel.pread(fd, new Uint8Array(1), 0),
        s.kernel.pwrite(fd, new Uint8Array(1), 0),
        s.kernel.poll(fd, 1),
        s.kernel.uffdioApi(fd, 0),
        s.mmap(fd),
        s.kernel.close(fd),
      ]),
    expect: Array(100).fill('EBADF'),
  }),
  scenario('boundary ioctl', 'an argument of ioctl that could be an address is EFAULT', {
    given: (s) => s.vm(),
    when: (s, vm) => [s.kernel.ioctl(vm, 0xc040aed4, 4096), s.kernel.ioctl(vm, 0x4020ae46, 1n << 40n)],
    expect: ['EFAULT', 'EFAULT'],
  }),
  scenario('boundary fixed', 'MAP_FIXED would replace memory of the process: EINVAL', {
    needs: [mappable],
    given: (s) => s.gmem(s.vm(), 16, MMAP),
    when: (s, file) => [
      s.mmap(file, { flags: MAP_FIXED | 1 }),
      s.mmap(-1, { flags: MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS }),
    ],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario('boundary poison', 'MADV_HWPOISON and MADV_SOFT_OFFLINE would poison the machine: EINVAL', {
    when: (s) => {
      const memory = s.anonymous(1);
      return [s.advise(memory, 0, 1, MADV_HWPOISON), s.advise(memory, 0, 1, MADV_SOFT_OFFLINE)];
    },
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario('boundary fcntl', 'a command fcntl does not offer is EINVAL', {
    given: (s) => s.memfd(1),
    when: (s, file) => [s.kernel.fcntl(file, 5, 0), s.kernel.fcntl(file, 99, 0)],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario('boundary open', 'a path that is not there is ENOENT', {
    when: (s) => [s.kernel.openKvm('/nonexistent/kvm'), s.kernel.open('/nonexistent/file', O_RDWR)],
    expect: ['ENOENT', 'ENOENT'],
  }),
  scenario('boundary mapping', 'a range that leaves its mapping is ENOMEM, EFAULT for a copy', {
    needs: [shareable],
    given: (s) => s.map(shared(s)),
    when: (s, mapping) => [
      s.advise(mapping, 16, 1, MADV_DONTNEED),
      s.advise(mapping, 8, 16, MADV_DONTNEED),
      s.kernel.mprotect(mapping, 16 * s.P, s.P, 1),
      s.kernel.mlock(mapping, 15 * s.P, 2 * s.P),
      s.kernel.mincore(mapping, 15 * s.P, 2 * s.P, new Uint8Array(2)),
      s.get(mapping, 16),
      s.put(mapping, 16, 1),
    ],
    expect: ['ENOMEM', 'ENOMEM', 'ENOMEM', 'ENOMEM', 'ENOMEM', 'EFAULT', 'EFAULT'],
  }),
  scenario('boundary handles', 'a mapping that is not there is like an address where nothing is mapped', {
    when: (s) => [
      s.advise(99999, 0, 1, MADV_DONTNEED),
      s.protect(99999, 1),
      s.kernel.mlock(99999, 0, s.P),
      s.kernel.mincore(99999, 0, s.P, new Uint8Array(1)),
      s.kernel.msync(99999, 0, s.P, 4),
      s.get(99999, 0),
      s.put(99999, 0, 1),
      s.kernel.munmap(99999),
    ],
    expect: ['ENOMEM', 'ENOMEM', 'ENOMEM', 'ENOMEM', 'ENOMEM', 'EFAULT', 'EFAULT', 'ENOMEM'],
  }),
  scenario('boundary alignment', 'an unaligned address is EINVAL, a length is rounded up', {
    needs: [shareable],
    given: (s) => s.map(shared(s)),
    when: (s, mapping) => [
      s.kernel.mprotect(mapping, 1, s.P, 1),
      s.kernel.mincore(mapping, 1, s.P, new Uint8Array(2)),
      s.kernel.msync(mapping, 1, s.P, 1),
      s.kernel.madvise(mapping, 0, 1, MADV_DONTNEED),
      s.kernel.mprotect(mapping, 0, 1, 1),
      s.put(mapping, 0, 1),
      s.put(mapping, 1, 1),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 0, 0, 'EFAULT', 1],
  }),
  scenario('boundary window range', 'a window outside its mapping is a TypeError', {
    needs: [shareable],
    given: (s) => s.map(shared(s)),
    when: (s, mapping) => [
      thrown(() => s.kernel.window(mapping, 0, 16 * s.P + 1)),
      thrown(() => s.kernel.window(mapping, 16 * s.P, 1)),
      thrown(() => s.kernel.window(mapping, -1, 1)),
      thrown(() => s.kernel.window(mapping, 0, -1)),
      thrown(() => s.kernel.window(mapping, 0.5, 1)),
      thrown(() => s.kernel.window(mapping, 0, Number.NaN)),
      thrown(() => s.kernel.window(99999, 0, 1)),
      thrown(() => s.kernel.addressOf(99999)),
      s.kernel.window(mapping, 15 * s.P, s.P).length === s.P,
      s.kernel.window(mapping, 16 * s.P, 0).length,
    ],
    expect: [...Array(8).fill('TypeError'), true, 0],
  }),
  scenario('boundary by number', 'requests that take their argument by value can be sent by number', {
    given: (s) => ({ kvm: s.kvm, vm: s.vm() }),
    when: (s, { kvm, vm }) => [
      s.kernel.ioctl(kvm, 0xae00, 0),
      s.kernel.ioctl(kvm, 0xae03, 3),
      s.kernel.ioctl(vm, 0xae03, 3),
      s.kernel.ioctl(vm, 0xae03, 99999),
      s.kernel.ioctl(kvm, 0xae04, 0) === s.kernel.getVcpuMmapSize(kvm),
      s.kernel.ioctl(kvm, 0xae01, 1n << 62n),
    ],
    expect: [12, 1, 1, 0, true, 'EINVAL'],
  }),
  scenario('boundary open kvm', '/dev/kvm can be opened like any path', {
    when: (s) => {
      const kvm = s.open('/dev/kvm', O_RDWR | O_CLOEXEC);
      return [kvm, s.kernel.getApiVersion(kvm), s.closesOnExec(kvm), s.closesOnExec(s.kvm)];
    },
    expect: ['ok', 12, true, true],
  }),
  scenario('boundary mincore', 'a residency array shorter than the range is EFAULT', {
    needs: [shareable],
    given: (s) => s.map(shared(s)),
    when: (s, mapping) => s.kernel.mincore(mapping, 0, 4 * s.P, new Uint8Array(3)),
    expect: 'EFAULT',
  }),
  scenario('boundary window', 'a window shows the mapping’s bytes, and munmap detaches it', {
    needs: [shareable],
    given: (s) => s.map(shared(s)),
    when: (s, mapping) => {
      const window = s.kernel.window(mapping, s.P, s.P);
      window[0] = 9;
      const seen = s.get(mapping, 1);
      const written = [s.put(mapping, 1, 8), window[0]];
      return [window.length, seen, ...written, s.munmap(mapping), window.length];
    },
    expect: (s) => [s.P, 9, 1, 8, 0, 0],
  }),
  scenario('boundary own window', 'a window of its own can be released without the others', {
    needs: [shareable, separateWindows],
    given: (s) => s.map(shared(s)),
    when: (s, mapping) => {
      const own = s.kernel.window(mapping, 0, s.P, true);
      const other = s.kernel.window(mapping, 0, s.P);
      own[0] = 3;
      s.kernel.releaseWindow(own);
      return [own.length, other.length, other[0] as number];
    },
    expect: (s) => [0, s.P, 3],
  }),
  scenario('boundary addresses', 'a mapping has an address, a page’s multiple, and two do not overlap', {
    when: (s) => {
      const [a, b] = [s.anonymous(4), s.anonymous(4)].map((mapping) => s.kernel.addressOf(mapping)) as [bigint, bigint];
      const distance = a < b ? b - a : a - b;
      return [a > 0n, a % BigInt(s.P), b % BigInt(s.P), distance >= BigInt(4 * s.P)];
    },
    expect: [true, 0, 0, true],
  }),
  scenario('boundary types', 'an argument that no system call could take is a TypeError, and nothing happens', {
    given: (s) => ({ vm: s.vm(), kvm: s.kvm }),
    when: (s, { vm, kvm }) => [
      thrown(() => s.kernel.createVm(kvm, Number.NaN)),
      thrown(() => s.kernel.createVm(kvm, 0.5)),
      thrown(() => s.kernel.createVm(kvm, wrong('0'))),
      thrown(() => s.kernel.createVm(kvm, 2n ** 64n)),
      thrown(() => s.kernel.createGuestMemfd(vm, { size: wrong('4096'), flags: 0 })),
      thrown(() => s.kernel.createGuestMemfd(vm, { size: 4096, flags: wrong(undefined) })),
      thrown(() => s.kernel.createGuestMemfd(vm, { size: -(2n ** 63n) - 1n, flags: 0 })),
      thrown(() => s.slot(vm, { slot: 0.5 })),
      thrown(() => s.slot(vm, { gpa: Number.POSITIVE_INFINITY })),
      thrown(() => s.kernel.close(wrong('3'))),
      thrown(() => s.kernel.fallocate(vm, 3, wrong(null), 4096)),
      thrown(() => s.kernel.read(vm, wrong([1]))),
    ],
    expect: Array(12).fill('TypeError'),
  }),
  scenario('boundary explain', 'a refusal comes with the rule it broke', {
    needs: [gmemSlots],
    given: (s) => s.gmemVm(),
    when: (s, vm) => [
      s.slot(vm, { pages: 4 }),
      s.slot(vm, { slot: 1, at: 3 }),
      typeof s.kernel.explain() === 'string' && (s.kernel.explain() ?? '').length > 10,
    ],
    expect: [0, 'EEXIST', true],
  }),
  scenario('boundary async', 'the calls that may take long have a twin on a thread of its own, with the same answers', {
    needs: [shareable],
    given: (s) => {
      const file = shared(s);
      return { file, mapping: s.map(file) };
    },
    when: async (s, { file, mapping }) => [
      await s.kernel.fallocateAsync(file, 1, 0, 4 * s.P),
      s.cached(file),
      await s.kernel.fallocateAsync(file, 3, 0, s.P),
      await s.kernel.fallocateAsync(file, 3, 1, s.P),
      s.cached(file),
      await s.kernel.madviseAsync(mapping, s.P, s.P, MADV_REMOVE),
      await s.kernel.madviseAsync(mapping, 0, s.P, MADV_HWPOISON),
      s.cached(file),
      await s.kernel.fallocateAsync(99999, 3, 0, s.P),
    ],
    expect: [0, 4, 0, 'EINVAL', 3, 0, 'EINVAL', 2, 'EBADF'],
  }),
  scenario('boundary async attributes', 'attributes can be set on a thread of its own', {
    needs: [swProtected],
    given: (s) => s.vm(1),
    when: async (s, vm) => [
      await s.kernel.setMemoryAttributesAsync(vm, { address: 0, size: 4 * s.P, attributes: 8, flags: 0 }),
      await s.kernel.setMemoryAttributesAsync(vm, { address: 0, size: s.P, attributes: 1, flags: 0 }),
      s.privateRanges(vm),
    ],
    expect: [0, 'EINVAL', [[0, 4]]],
  }),
  scenario('boundary statistics', 'a file of statistics: read at any offset, and nothing else', {
    given: (s) => {
      const vm = s.vm();
      const [ofVm, ofVcpu] = [vm, s.vcpu(vm)].map((fd) => s.kernel.getStatsFd(fd));
      return { ofVm: ofVm as number, ofVcpu: ofVcpu as number, memfd: s.memfd(1) };
    },
    when: (s, { ofVm, ofVcpu, memfd }) => {
      const { kernel } = s;
      const header = new Uint8Array(24);
      const answers = [
        kernel.read(ofVm, header),
        kernel.read(ofVcpu, header),
        // The kernel says how long names are, and where the counters begin.
        header[4] ?? 0,
        kernel.pread(ofVcpu, header, 0),
        kernel.pread(ofVcpu, header, 2 ** 30),
        kernel.lseek(ofVcpu, 8, SEEK_SET),
        kernel.write(ofVcpu, header),
        kernel.pwrite(ofVcpu, header, 0),
        kernel.ftruncate(ofVcpu, 0),
        kernel.fallocate(ofVcpu, 1, 0, s.P),
        kernel.fcntl(ofVcpu, F_GETFL, 0),
        kernel.mmap({ length: s.P, prot: PROT_READ, flags: MAP_PRIVATE, fd: ofVcpu, offset: 0 }),
        kernel.getStatsFd(s.kvm),
        kernel.getStatsFd(memfd),
        kernel.getStatsFd(99999),
      ];
      for (const fd of [ofVm, ofVcpu]) kernel.close(fd);
      return answers;
    },
    expect: [24, 24, 48, 24, 0, 24, 'EBADF', 'ESPIPE', 'EINVAL', 'EBADF', 0, 'ENODEV', 'EINVAL', 'ENOTTY', 'EBADF'],
  }),
  scenario('boundary mlock2', 'mlock2 locks pages that are there, or from their first touch on', {
    given: (s) => s.anonymous(4),
    when: (s, mapping) => {
      const { kernel, P } = s;
      const lock = (offset: number, length: number, flags: number) => kernel.mlock2(mapping, offset, length, flags);
      const answers = [lock(0, P, 2), lock(0, P, MLOCK_ONFAULT), lock(2 * P, P, 0), lock(0, 5 * P, 0)];
      const residency = new Uint8Array(4);
      kernel.mincore(mapping, 0, 4 * P, residency);
      return [...answers, ...Array.from(residency, (byte) => byte & 1), kernel.munlock(mapping, 0, 4 * P)];
    },
    expect: ['EINVAL', 0, 0, 'ENOMEM', 0, 0, 1, 0, 0],
  }),
  scenario('boundary getrlimit', 'limits of the process by their numbers', {
    when: (s) => {
      const limit: { cur?: bigint; max?: bigint } = {};
      const { kernel } = s;
      return [
        kernel.getrlimit(RLIMIT_MEMLOCK, limit),
        typeof limit.cur === 'bigint' && typeof limit.max === 'bigint' && limit.cur <= limit.max,
        kernel.getrlimit(16, limit),
        kernel.getrlimit(-1, limit),
      ];
    },
    expect: [0, true, 'EINVAL', 'EINVAL'],
  }),
  scenario('boundary running', 'no vCPU runs unless somebody runs it', {
    given: (s) => {
      const vm = s.vm();
      return { vm, vcpu: s.vcpu(vm), memfd: s.memfd(1) };
    },
    when: async (s, { vm, vcpu, memfd }) => {
      const { kernel } = s;
      const before = kernel.runningVcpus(vm);
      const run = kernel.runAsync(vcpu, 0);
      const during = kernel.runningVcpus(vm);
      await run;
      return [before, during, ...[vm, vcpu, s.kvm, memfd, 99999].map((fd) => kernel.runningVcpus(fd))];
    },
    expect: [0, 1, 0, 'EINVAL', 'EINVAL', 'ENOTTY', 'EBADF'],
  }),
  scenario('boundary getter', 'what is no VM fd has no attributes', {
    when: (s) => [s.kernel.privateGfns(s.kvm) === undefined, s.kernel.privateGfns(99999) === undefined],
    expect: [true, true],
  }),
]);
