import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/**
 * The native functions. Scalars travel as 64-bit words of `command`, written before the call; the comment behind each function
 * names its words, `→` the words it leaves there. A result is ≥ 0 or `-errno`. No function throws, and none validates more than
 * memory safety asks for. A buffer that is not a Uint8Array, or a string that is none, is `-EINVAL`.
 *
 * Where the caller answers for memory: the bitmap of `getDirtyLog` must be as long as the slot needs, because the kernel takes its length
 * from the slot, and an address inside a struct, or the argument of `ioctl`, is passed on as it is.
 */
export interface Addon {
  /** 64 words of 64 bits, of this thread. */
  readonly command: ArrayBuffer;
  readonly pageSize: number;

  // ── any fd, /dev/kvm
  ioctl(): number; // [fd, request, argument]
  open(path: string): number; // [flags, mode]
  createVm(): number; // [kvm, type]

  getStatsFd(): number; // [fd]; of a VM or a vCPU
  getrlimit(): number; // [resource] → [soft, hard]

  // ── VM fds
  createGuestMemfd(): number; // [vm, size, flags]; sets FD_CLOEXEC
  setUserMemoryRegion(): number; // [vm, slot, flags, guestPhysAddr, memorySize, userspaceAddr]
  setUserMemoryRegion2(): number; // [vm, slot, flags, guestPhysAddr, memorySize, userspaceAddr, guestMemfdOffset, guestMemfd]
  setMemoryAttributes(): number; // [vm, address, size, attributes, flags]
  setMemoryAttributesAsync(): Promise<number>; // the same
  enableCap(): number; // [fd, cap, flags, args[0] … args[3]]
  getDirtyLog(bitmap: Uint8Array | null): number; // [vm, slot]
  clearDirtyLog(bitmap: Uint8Array | null): number; // [vm, slot, numPages, firstPage]; too short is NULL

  // ── guest_memfd fds
  setMemoryAttributes2(): number; // [gmem, offset, size, attributes, flags] → [error_offset]

  // ── vCPU fds: EBADF for run, runAsync and runPage unless createVcpu returned it on this thread; EBUSY while runAsync runs it
  createVcpu(): number; // [vm, id]; its kvm_run is mapped until the fd is closed
  run(): number; // [vcpu, nanoseconds]; 0 completes what is pending and enters no guest; ETIME when the time is over
  runAsync(): Promise<number>; // the same
  kick(): number; // [vcpu], of any thread of the process
  runPage(): ArrayBuffer | number; // [vcpu]; a window over kvm_run, detached by close; EOPNOTSUPP without external buffers
  preFaultMemory(): number; // [vcpu, gpa, size, flags] → [gpa, size]

  // ── structs and values: copied to where nothing can be overrun
  ioctlStruct(struct: Uint8Array): number; // [fd, request, ends in an array]; the caller answers for its having no pointers
  getOneReg(value: Uint8Array): number; // [vcpu, id]
  setOneReg(value: Uint8Array): number; // [vcpu, id]
  getDeviceAttr(value: Uint8Array): number; // [fd, flags, group, attr]
  setDeviceAttr(value: Uint8Array): number; // [fd, flags, group, attr]
  hasDeviceAttr(): number; // [fd, flags, group, attr]
  createDevice(): number; // [vm, type, flags]; its fd, 0 with KVM_CREATE_DEVICE_TEST

  // ── files
  fallocate(): number; // [fd, mode, offset, length]
  fallocateAsync(): Promise<number>; // the same
  ftruncate(): number; // [fd, length]
  fstat(): number; // [fd] → [mode, size, blocks, blksize, ino, nlink]
  fstatfs(): number; // [fd] → [type, bsize]
  cachestat(): number; // [fd, offset, length] → [cache, dirty, writeback, evicted, recentlyEvicted]
  fsync(): number; // [fd]
  read(target: Uint8Array): number; // [fd]
  write(source: Uint8Array): number; // [fd]
  pread(target: Uint8Array): number; // [fd, offset]
  pwrite(source: Uint8Array): number; // [fd, offset]
  lseek(): number; // [fd, offset, whence]
  memfdCreate(name: string): number; // [flags]
  memfdSecret(): number; // [flags]
  fcntl(): number; // [fd, cmd, argument]
  poll(): number; // [fd, events]; the returned events, POLLNVAL among them
  epollCreate1(): number; // [flags]
  epollCtl(): number; // [epoll, op, fd, events]
  eventfd(): number; // [initval, flags]
  dup(): number; // [fd]; F_DUPFD_CLOEXEC
  adopt(): number; // [fd]; close-on-exec from now on
  close(): number; // [fd]; EBADF unless a function here opened it on this thread. Ends a run of a vCPU

  // ── mappings: a handle that is not in use, or a range that leaves its mapping, is ENOMEM (EFAULT for peek and poke)
  mmap(): number; // [length, prot, flags, fd, offset]; a handle. MAP_FIXED is EINVAL
  address(): number; // [mapping] → [address]
  mprotect(): number; // [mapping, offset, length, prot]
  madvise(): number; // [mapping, offset, length, advice]
  madviseAsync(): Promise<number>; // the same
  mlock(): number; // [mapping, offset, length]
  mlock2(): number; // [mapping, offset, length, flags]
  munlock(): number; // [mapping, offset, length]
  msync(): number; // [mapping, offset, length, flags]
  mbind(): number; // [mapping, offset, length, policy, maxnode, mask…]; maxnode 0 is a NULL mask
  getMempolicy(): number; // [mapping, offset]
  mincore(residency: Uint8Array): number; // [mapping, offset, length]; too short is NULL
  userfaultfd(): number; // [flags]
  uffdioApi(): number; // [uffd, features]
  uffdioRegister(): number; // [uffd, mapping, offset, length, mode]
  uffdioUnregister(): number; // [uffd, mapping, offset, length]
  uffdioCopy(source: Uint8Array): number; // [uffd, mapping, offset, mode]; bytes copied
  uffdioZeropage(): number; // [uffd, mapping, offset, length, mode]; bytes made
  uffdRead(): number; // [uffd, milliseconds] → [address…]; how many, 0 when none came
  peek(target: Uint8Array): number; // [mapping, offset]; bytes copied
  poke(source: Uint8Array): number; // [mapping, offset]; bytes copied
  window(): ArrayBuffer | number; // [mapping, offset, length]; EOPNOTSUPP without external buffers, EFBIG past the longest
  detach(window: ArrayBuffer): number; // EINVAL unless it is an attached window
  detachAll(): number; // [mapping]
  munmap(): number; // [mapping]; detaches its windows first

  // ── other threads: ENOENT for a number that nobody shares
  shareFile(): number; // [fd]
  takeFile(): number; // [share]
  isShared(): number; // [share]; 1 or 0
  countRunningElsewhere(): number; // [vm]; vCPUs of a shared VM that other threads run now
  shareMapping(): number; // [mapping]
  takeMapping(): number; // [share] → [length]

  // ── Unix sockets, whose calls do not wait: EAGAIN. A leading @ of a path is the abstract namespace
  socket(): number; // [type]
  bind(path: string): number; // [fd]
  connect(path: string): number; // [fd]
  listen(): number; // [fd, backlog]
  accept4(): number; // [fd]
  sendmsg(source: Uint8Array): number; // [fd, count, fds…]; at most 32 fds
  recvmsg(target: Uint8Array): number; // [fd] → [count, fds…]; EMSGSIZE when it does not fit

  // ── libunicorn 2, opened at run time: an engine that is not in use is EBADF, what the library refuses EINVAL
  unicornLoad(): number; // ENOENT without the library
  unicornOpen(): number; // [arch, mode]; an engine
  unicornClose(): number; // [engine]
  unicornMap(): number; // [engine, address, size, permissions]
  unicornUnmap(): number; // [engine, address, size]
  unicornProtect(): number; // [engine, address, size, permissions]
  unicornWrite(source: Uint8Array): number; // [engine, address]
  unicornRead(target: Uint8Array): number; // [engine, address]
  unicornSetRegister(value: Uint8Array): number; // [engine, register]
  unicornGetRegister(value: Uint8Array): number; // [engine, register]
  unicornStart(): number; // [engine, pc, instructions, has answer, answer] → [event, address, size, value, last pc, is there a next, next pc]
}

/** A place where the addon could have been, and why it is not loaded from there. */
export interface AddonAttempt {
  path: string;
  problem: string;
}

/** The addon cannot be loaded. The message says what was tried and which command helps. */
export class AddonUnavailable extends Error {
  override readonly name = 'AddonUnavailable';
  readonly attempts: readonly AddonAttempt[];

  constructor(attempts: readonly AddonAttempt[], advice: string, options?: ErrorOptions) {
    const tried = attempts.map(({ path, problem }) => `  ${path}: ${problem}`).join('\n');
    super(`the native addon cannot be loaded\n${tried}\n${advice}`, options);
    this.attempts = attempts;
  }
}

const require = createRequire(import.meta.url);
const supported = ['linux-x64', 'linux-arm64'];

let outcome: { addon: Addon } | { error: AddonUnavailable } | undefined;

/** The addon, the same one for every call. Throws AddonUnavailable, the same way every time. */
export function loadAddon(): Addon {
  outcome ??= attempt();
  if ('error' in outcome) throw outcome.error;
  return outcome.addon;
}

function attempt(): { addon: Addon } | { error: AddonUnavailable } {
  const root = packageRoot();
  const platform = `${process.platform}-${process.arch}`;
  if (!supported.includes(platform)) {
    const problem = `wrong platform: this is ${platform}, the addon exists for ${supported.join(' and ')}`;
    return { error: new AddonUnavailable([{ path: root, problem }], 'The software kernel runs everywhere.') };
  }

  const build = require('node-gyp-build') as { resolve(directory: string): string };
  let file: string;
  try {
    file = build.resolve(root);
  } catch (cause) {
    return { error: new AddonUnavailable(placesTried(root, platform), advice(root), { cause }) };
  }
  try {
    return { addon: require(file) as Addon };
  } catch (cause) {
    const problem = loadProblem(cause instanceof Error ? cause.message : String(cause));
    return { error: new AddonUnavailable([{ path: file, problem }], advice(root), { cause }) };
  }
}

/** The directory of our package.json: from the TypeScript sources, from dist, and from node_modules alike. */
function packageRoot(): string {
  let directory = dirname(fileURLToPath(import.meta.url));
  while (dirname(directory) !== directory) {
    const file = join(directory, 'package.json');
    if (existsSync(file) && JSON.parse(readFileSync(file, 'utf8')).name === 'guest-memfd') return directory;
    directory = dirname(directory);
  }
  return directory;
}

/** Where node-gyp-build looked, in its order, when it found nothing. */
function placesTried(root: string, platform: string): AddonAttempt[] {
  const start = process.env.GUEST_MEMFD_PREBUILD ?? root;
  const others = listing(join(start, 'prebuilds'));
  return [
    ...['build/Release', 'build/Debug'].map((place) => ({
      path: join(start, place),
      problem: 'no file, nothing built',
    })),
    {
      path: join(start, 'prebuilds', platform),
      problem: others.length === 0 ? 'no file' : `wrong platform: there is only ${others.join(', ')}`,
    },
    { path: join(dirname(process.execPath), 'prebuilds', platform), problem: 'no file' },
  ];
}

function listing(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch {
    return [];
  }
}

function loadProblem(message: string): string {
  if (/GLIBC(XX)?_/.test(message)) return `the system's C library is older than the addon: ${message}`;
  if (/invalid ELF header|wrong ELF class|cannot open shared object file/.test(message)) {
    return `built for another machine: ${message}`;
  }
  return `dlopen: ${message}`;
}

function advice(root: string): string {
  const command = existsSync(join(root, 'scripts', 'build.mjs')) ? 'npm run build' : 'npx node-gyp rebuild';
  return `To build it: (cd ${root} && ${command}), with a compiler installed: apt install g++ make python3`;
}
