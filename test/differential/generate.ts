import * as fc from 'fast-check';
import * as uapi from '../../lib/uapi.ts';
import { capsAsked, capsEnabled } from './capabilities.ts';
import { Dice } from './dice.ts';
import type { Call, Num, Program, Step } from './program.ts';
import { simpler } from './simpler.ts';

const { KVM_CAP, PROT_READ, PROT_WRITE } = uapi;
// PROT_WRITE alone is not tried: whether it can be read depends on how many bytes a copy on Linux has.
const RW = PROT_READ | PROT_WRITE;
const ANONYMOUS = uapi.MAP_PRIVATE | uapi.MAP_ANONYMOUS;
const ADVICE = [
  uapi.MADV_DONTNEED,
  uapi.MADV_REMOVE,
  uapi.MADV_POPULATE_READ,
  uapi.MADV_POPULATE_WRITE,
  uapi.MADV_WILLNEED,
  uapi.MADV_COLD,
  uapi.MADV_WIPEONFORK,
  uapi.MADV_DONTFORK,
  uapi.MADV_GUARD_INSTALL,
  uapi.MADV_GUARD_REMOVE,
  uapi.MADV_DONTNEED_LOCKED,
  5,
  99,
];

function region(d: Dice) {
  const slot = d.slot();
  const flags = d.weighted([
    [7, 0],
    [4, uapi.KVM_MEM_LOG_DIRTY_PAGES],
    [2, uapi.KVM_MEM_READONLY],
    [1, 3],
    [1, d.of([4, 5, 6, 7, 8, 1 << 16, 1 << 17, 0x80000000, 0xffffffff])],
  ]);
  return {
    vm: d.fd('vm'),
    slot,
    space: d.space(),
    flags,
    gpa: d.chance(98) ? d.address() : (['2^64', -1 - d.below(3)] as const),
    size: d.weighted<Num>([
      [6, 1 + (slot % 4)],
      [3, 0],
      [2, d.size()],
      [1, d.edge()],
    ]),
    hva: d.host(slot),
  };
}

const steps: Readonly<Record<Call, (d: Dice) => Step>> = {
  createVm: (d) => ({
    call: 'createVm',
    fd: d.fd('kvm', 90),
    type: d.weighted<Num>([
      [4, 0],
      [4, ['0', 0, 1]],
      [3, ['2^31', 0]],
      [2, ['0', 0, d.of([31, 32, 36, 40, 48, 52, 53])]],
      [2, ['0', 0, d.of([6, 7, 255, 256])]],
      [1, d.edge()],
    ]),
  }),
  checkExtension: (d) => ({
    call: 'checkExtension',
    fd: d.fd(d.chance(30) ? 'kvm' : 'vm', 90),
    cap: d.chance(90) ? d.of(capsAsked) : d.of([-1, 5000, 100_000]),
  }),
  createGuestMemfd: (d) => ({
    call: 'createGuestMemfd',
    vm: d.fd('vm'),
    size: d.weighted<Num>([
      [20, d.of([1, 4, 8, 8, 16, 80])],
      [2, d.edge()],
      [1, ['0', d.below(8), d.of([1, -1, 512])]],
    ]),
    flags: d.chance(88) ? d.of([0, 1, 1, 2, 3, 3]) : d.of([4, 8, 0x80000000, 7]),
  }),
  setUserMemoryRegion: (d) => ({ call: 'setUserMemoryRegion', ...region(d) }),
  setUserMemoryRegion2: (d) => {
    const common = region(d);
    const bind = d.chance(55);
    return {
      call: 'setUserMemoryRegion2',
      ...common,
      flags: bind
        ? d.weighted([
            [12, 4],
            [1, 5],
            [1, 6],
            [1, common.flags | 4],
          ])
        : common.flags,
      file: bind || d.chance(20) ? d.fd('file', 92) : 'none',
      offset: d.weighted<Num>([
        [10, d.below(8)],
        [3, 0],
        [1, ['file', d.below(5) - 4]],
        [1, d.edge()],
      ]),
    };
  },
  setMemoryAttributes: (d) => ({
    call: 'setMemoryAttributes',
    vm: d.fd('vm'),
    address: d.chance(80) ? d.page() : d.edge(),
    size: d.size(),
    attributes: d.weighted([
      [8, 8],
      [5, 0],
      [1, d.of([1, 2, 4, 7, 9, 12, 16])],
    ]),
    flags: d.chance(93) ? 0 : d.of([1, 8]),
  }),
  enableCap: (d) => {
    const cap = d.of(capsEnabled);
    const ring = cap === KVM_CAP.DIRTY_LOG_RING || cap === KVM_CAP.DIRTY_LOG_RING_ACQ_REL;
    const value: Num = ring
      ? d.of([1, 1, 2, 16, 256, 3, 512])
      : ['0', 0, d.of([0, 0, 1, 1, 2, 3, 3, 4, 0x1000, 0x1001])];
    const common = { call: 'enableCap', fd: d.fd('vm', 96), cap } as const;
    return { ...common, flags: d.chance(88) ? 0 : d.of([1, 0x80000000]), value: d.chance(90) ? value : d.edge() };
  },
  getDirtyLog: (d) => ({
    call: 'getDirtyLog',
    vm: d.fd('vm'),
    slot: ((d.space() << 16) | d.slot()) >>> 0,
    bytes: d.weighted([
      [8, 32],
      [1, 8],
      [1, 0],
      [1, null],
    ]),
  }),
  clearDirtyLog: (d) => ({
    call: 'clearDirtyLog',
    vm: d.fd('vm'),
    slot: ((d.space() << 16) | d.slot()) >>> 0,
    first: d.weighted([
      [8, 0],
      [2, 64],
      [1, d.of([1, 63, 128])],
    ]),
    pages: d.weighted([
      [3, d.below(5)],
      [2, 64],
      [1, d.of([0, 63, 65, 128, 0xffffffff])],
    ]),
    bytes: d.weighted([
      [8, 32],
      [1, 0],
      [1, null],
    ]),
  }),
  createVcpu: (d) => ({
    call: 'createVcpu',
    vm: d.fd('vm'),
    id: d.weighted([
      [6, 1 + d.below(3)],
      [1, d.below(2)],
      [1, d.of([4095, 4096, 0xffffffff])],
    ]),
  }),
  preFaultMemory: (d) => ({
    call: 'preFaultMemory',
    vcpu: d.fd('vcpu'),
    gpa: d.address(),
    size: d.size(),
    flags: d.chance(95) ? 0 : 1,
  }),
  memfdCreate: (d) => ({ call: 'memfdCreate', flags: d.of([0, 1, 1, 2, 3]) }),
  fallocate: (d) => ({
    call: 'fallocate',
    fd: d.fd('file', 97),
    mode: d.weighted([
      [8, 1],
      [8, 3],
      [1, 0],
      [2, d.of([2, 4, 8, 9, 0x10, 0x11, 0x20, 0x40, 0x41, 0x80, 0x81, 7, 0x13, 0x100, -1])],
    ]),
    offset: d.weighted<Num>([
      [16, d.page()],
      [3, d.edge()],
      [1, ['2^63', -1 - d.below(2)]],
    ]),
    length: d.size(),
  }),
  ftruncate: (d) => ({
    call: 'ftruncate',
    fd: d.fd('file'),
    length: d.weighted<Num>([
      [6, d.below(10)],
      [1, ['0', d.below(4), d.of([1, 100])]],
      [1, ['2^63', 0]],
      [1, ['file', 0]],
    ]),
  }),
  fstat: (d) => ({ call: 'fstat', fd: d.fd('file', 90) }),
  fstatfs: (d) => ({ call: 'fstatfs', fd: d.fd('file', 100) }),
  fsync: (d) => ({ call: 'fsync', fd: d.fd('file', 90) }),
  fcntl: (d) => ({
    call: 'fcntl',
    fd: d.fd('file', 80),
    command: d.of([uapi.F_GETFD, uapi.F_GETFL, uapi.F_ADD_SEALS, uapi.F_ADD_SEALS, uapi.F_GET_SEALS, 99]),
    argument: d.of([0, 2, 4, 8, 8, 1, 64]),
  }),
  dup: (d) => ({ call: 'dup', fd: d.fd('file', 70) }),
  close: (d) => ({
    call: 'close',
    fd: d.fd(
      d.weighted([
        [6, 'file'],
        [2, 'vcpu'],
        [1, 'vm'],
      ] as const),
      97,
    ),
  }),
  read: (d) => ({ call: 'read', fd: d.fd('file'), bytes: d.of([0, 1, 100]) }),
  write: (d) => ({ call: 'write', fd: d.fd('file'), bytes: d.of([0, 1, 100]) }),
  pread: (d) => ({ call: 'pread', fd: d.fd('file'), offset: fileOffset(d), bytes: d.of([0, 1, 5000]) }),
  pwrite: (d) => ({ call: 'pwrite', fd: d.fd('file'), offset: fileOffset(d), bytes: d.of([0, 1, 5000]) }),
  lseek: (d) => ({ call: 'lseek', fd: d.fd('file'), offset: fileOffset(d), whence: d.of([0, 0, 1, 2, 3, 4, 5, -1]) }),
  cachestat: (d) => ({
    call: 'cachestat',
    fd: d.fd('file', 100),
    offset: d.page(),
    length: d.chance(30) ? 0 : d.pages(),
  }),
  mmap: (d) => {
    const anonymous = d.chance(40);
    return {
      call: 'mmap',
      fd: d.fd('file', 94),
      length: d.weighted<Num>([
        [16, 1 + d.below(8)],
        [3, d.pages()],
        [3, d.edge()],
      ]),
      offset: d.weighted<Num>([
        [12, 0],
        [4, d.below(5)],
        [2, d.edge()],
      ]),
      prot: d.weighted([
        [16, RW],
        [2, PROT_READ],
        [1, d.of([0, 5, 7])],
      ]),
      flags: anonymous
        ? d.weighted([
            [16, ANONYMOUS],
            [1, uapi.MAP_SHARED | uapi.MAP_ANONYMOUS],
            [1, d.of([uapi.MAP_SHARED_VALIDATE, uapi.MAP_SHARED_VALIDATE | uapi.MAP_SYNC, 0]) | uapi.MAP_ANONYMOUS],
          ])
        : d.weighted([
            [12, uapi.MAP_SHARED],
            [1, uapi.MAP_PRIVATE],
            [1, uapi.MAP_SHARED_VALIDATE],
            [
              5,
              d.of([
                0,
                uapi.MAP_SHARED_VALIDATE | uapi.MAP_SYNC,
                uapi.MAP_SHARED | uapi.MAP_POPULATE,
                uapi.MAP_SHARED | uapi.MAP_GROWSDOWN,
                uapi.MAP_SHARED | uapi.MAP_HUGETLB,
              ]),
            ],
          ]),
    };
  },
  munmap: (d) => ({ call: 'munmap', map: d.below(8) }),
  mprotect: (d) => ({ call: 'mprotect', ...range(d), prot: d.of([0, PROT_READ, RW, RW, 5, 7, 16]) }),
  madvise: (d) => ({ call: 'madvise', ...range(d), advice: d.of(ADVICE) }),
  msync: (d) => ({ call: 'msync', ...range(d), flags: d.of([0, 1, 2, 4, 5, 6, 8]) }),
  mlock: (d) => ({ call: 'mlock', ...range(d) }),
  munlock: (d) => ({ call: 'munlock', ...range(d) }),
  mincore: (d) => ({ call: 'mincore', ...range(d) }),
  peek: (d) => ({ call: 'peek', ...bytes(d) }),
  poke: (d) => ({ call: 'poke', ...bytes(d), value: 1 + d.below(250) }),
  guestRead: (d) => ({ call: 'guestRead', vm: d.fd('vm', 100), page: d.page() }),
  guestWrite: (d) => ({ call: 'guestWrite', vm: d.fd('vm', 100), page: d.page(), value: 1 + d.below(250) }),
  guestShare: (d) => ({ call: 'guestShare', vm: d.fd('vm', 100), page: d.page() }),
  guestUnshare: (d) => ({ call: 'guestUnshare', vm: d.fd('vm', 100), page: d.page() }),
};

function range(d: Dice): { map: number; from: Num; length: Num } {
  const from: Num = d.chance(92) ? d.below(5) : d.edge();
  return {
    map: d.below(8),
    from,
    length: d.weighted<Num>([
      [14, 1 + d.below(4)],
      [1, d.edge()],
    ]),
  };
}

/** A copy that may begin and end inside a page. */
function bytes(d: Dice): { map: number; from: Num; length: Num } {
  const from: Num = d.weighted<Num>([
    [6, d.below(6)],
    [3, ['0', d.below(5), d.of([-1, 1, 2048])]],
    [1, d.edge()],
  ]);
  return { map: d.below(8), from, length: d.of<Num>([['0', 0, 1], 1, 2, 3, ['0', 1, 7], 0]) };
}

function fileOffset(d: Dice): Num {
  return d.weighted<Num>([
    [6, d.below(6)],
    [2, ['0', d.below(3), d.of([1, 100])]],
    [1, ['2^63', 0]],
    [1, ['2^64', 0, -1]],
  ]);
}

const weights: Readonly<Record<Call, number>> = {
  createVm: 10,
  checkExtension: 12,
  createGuestMemfd: 40,
  setUserMemoryRegion: 70,
  setUserMemoryRegion2: 190,
  setMemoryAttributes: 70,
  enableCap: 34,
  getDirtyLog: 30,
  clearDirtyLog: 35,
  createVcpu: 12,
  preFaultMemory: 30,
  memfdCreate: 8,
  fallocate: 75,
  ftruncate: 12,
  fstat: 12,
  fstatfs: 3,
  fsync: 3,
  fcntl: 9,
  dup: 10,
  close: 22,
  read: 4,
  write: 4,
  pread: 5,
  pwrite: 6,
  lseek: 6,
  cachestat: 8,
  mmap: 56,
  munmap: 14,
  mprotect: 9,
  madvise: 30,
  msync: 6,
  mlock: 6,
  munlock: 5,
  mincore: 20,
  peek: 45,
  poke: 40,
  guestRead: 3,
  guestWrite: 3,
  guestShare: 1,
  guestUnshare: 1,
};

/** Random steps: those of `calls` only, when given. */
class StepArbitrary extends fc.Arbitrary<Step> {
  readonly #choices: readonly (readonly [number, Call])[];

  constructor(calls?: readonly Call[]) {
    super();
    const all = Object.entries(weights) as [Call, number][];
    this.#choices = all.filter(([call]) => !calls || calls.includes(call)).map(([call, weight]) => [weight, call]);
  }

  generate(random: fc.Random): fc.Value<Step> {
    const dice = new Dice(random);
    return new fc.Value(steps[dice.weighted(this.#choices)](dice), undefined);
  }

  canShrinkWithoutContext(value: unknown): value is Step {
    return typeof value === 'object' && value !== null && 'call' in value;
  }

  shrink(step: Step): fc.Stream<fc.Value<Step>> {
    return fc.stream(simpler(step)).map((one) => new fc.Value(one, undefined));
  }
}

/** A VM or two to begin with, memory, and files of the kinds that there are. */
class SetupArbitrary extends fc.Arbitrary<Program> {
  generate(random: fc.Random): fc.Value<Program> {
    const d = new Dice(random);
    const type = (): Num =>
      d.weighted<Num>([
        [5, 0],
        [5, ['0', 0, 1]],
        [2, ['2^31', 0]],
        [1, ['0', 0, 36]],
      ]);
    const setup: Step[] = [
      { call: 'createVm', fd: 'kvm', type: type() },
      { call: 'createVm', fd: 'kvm', type: 0 },
      { call: 'createGuestMemfd', vm: 'vm0', size: 8, flags: d.below(4) },
      { call: 'createGuestMemfd', vm: 'vm0', size: d.of([4, 16]), flags: d.of([0, 1]) },
    ];
    for (let i = 0; i < 2; i++)
      setup.push({ call: 'mmap', fd: 'none', length: 8, offset: 0, prot: RW, flags: ANONYMOUS });
    if (d.chance(50)) setup.push({ call: 'createVcpu', vm: 'vm0', id: 1 });
    return new fc.Value(setup, undefined);
  }

  canShrinkWithoutContext(value: unknown): value is Program {
    return Array.isArray(value);
  }

  shrink(setup: Program): fc.Stream<fc.Value<Program>> {
    const fewer = setup.map((_, index) => setup.filter((_, other) => other !== index));
    return fc.Stream.of(...fewer.map((one) => new fc.Value(one, undefined)));
  }
}

/** Random programs of up to `length` steps behind a setup. */
export function programs({ length = 60, calls }: { length?: number; calls?: readonly Call[] | undefined } = {}) {
  const body = fc.array(new StepArbitrary(calls), { maxLength: length, size: 'max' });
  return fc.tuple(new SetupArbitrary(), body);
}

export function programOf([setup, body]: readonly [Program, Program]): Program {
  return [...setup, ...body];
}

export const callNames: readonly Call[] = Object.keys(weights) as Call[];
