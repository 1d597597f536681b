import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Kernel, linuxKernel, softwareKernel, uapi } from '../../lib/kernel/index.ts';
import { openFiles } from '../backends.ts';
import { all, Mine } from './bad_values.ts';

// Every method of the boundary with every bad value in every place, with every kind of fd and mapping, and with buffers that cannot be
// touched. Prints what went wrong, as JSON, and how many calls it made.

// Bad values are names of sockets too.
const FOLDER = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
process.chdir(FOLDER);
const isLinux = process.argv[2] === 'kvm';
let kernel: Kernel = isLinux ? linuxKernel() : softwareKernel();
const P = kernel.pageSize;

type Arguments = readonly unknown[];
interface Handles {
  readonly kvm: number;
  readonly vm: number;
  readonly gmem: number;
  /** Cannot be touched by the host. */
  readonly shut: number;
  readonly memfd: number;
  readonly epoll: number;
  readonly socket: number;
  readonly memory: number;
  readonly readOnly: number;
  /** A mapping of `shut`. */
  readonly shutMapping: number;
  /** A mapping of two pages of a file of one. */
  readonly pastEnd: number;
}

const MAP_PRIVATE_ANONYMOUS = uapi.MAP_PRIVATE | uapi.MAP_ANONYMOUS;
const RW = uapi.PROT_READ | uapi.PROT_WRITE;

function create(): Handles {
  if (!isLinux) kernel = softwareKernel({ kernel: '6.18', swProtected: false });
  const kvm = kernel.openKvm();
  const vm = kernel.createVm(kvm, 0);
  const gmem = kernel.createGuestMemfd(vm, { size: 16 * P, flags: 3 });
  const shut = kernel.createGuestMemfd(vm, { size: 16 * P, flags: 1 });
  const memfd = kernel.memfdCreate('hostile', uapi.MFD_CLOEXEC);
  kernel.ftruncate(memfd, P);
  const map = (fd: number, prot = RW) =>
    kernel.mmap({ length: 2 * P, prot, flags: fd < 0 ? MAP_PRIVATE_ANONYMOUS : uapi.MAP_SHARED, fd, offset: 0 });
  const handles = {
    kvm,
    vm,
    gmem,
    shut,
    memfd,
    epoll: kernel.epollCreate1(uapi.O_CLOEXEC),
    socket: kernel.socket(uapi.SOCK_SEQPACKET),
    memory: map(-1),
    readOnly: map(-1, uapi.PROT_READ),
    shutMapping: map(shut),
    pastEnd: map(memfd),
  };
  kernel.setUserMemoryRegion(vm, {
    slot: 0,
    flags: 1,
    guestPhysAddr: 0,
    memorySize: 2 * P,
    userspaceAddr: kernel.addressOf(handles.memory),
  });
  kernel.setUserMemoryRegion2(vm, {
    slot: 1,
    flags: 4,
    guestPhysAddr: 2 * P,
    memorySize: 2 * P,
    userspaceAddr: 0,
    guestMemfd: gmem,
    guestMemfdOffset: 0,
  });
  return handles;
}

const fds = ({ kvm, vm, gmem, shut, memfd, epoll, socket }: Handles) => [kvm, vm, gmem, shut, memfd, epoll, socket];
const mappings = ({ memory, readOnly, shutMapping, pastEnd }: Handles) => [memory, readOnly, shutMapping, pastEnd];

function close(handles: Handles): void {
  for (const mapping of mappings(handles)) kernel.munmap(mapping);
  for (const fd of fds(handles)) kernel.close(fd);
}

/** Arguments that would do; those that are an fd or a mapping are marked by where they come from. */
const methods: Readonly<Record<string, (h: Handles) => Arguments>> = {
  explain: () => [],
  privateGfns: ({ vm }) => [vm],
  privatePages: ({ gmem }) => [gmem],
  ioctl: ({ kvm }) => [kvm, uapi.KVM_GET_API_VERSION, 0],
  openKvm: () => ['/dev/kvm'],
  getApiVersion: ({ kvm }) => [kvm],
  getVcpuMmapSize: ({ kvm }) => [kvm],
  checkExtension: ({ kvm }) => [kvm, 3],
  createVm: ({ kvm }) => [kvm, 0],
  createGuestMemfd: ({ vm }) => [vm, { size: P, flags: 0 }],
  setUserMemoryRegion: ({ vm, memory }) => [
    vm,
    { slot: 7, flags: 0, guestPhysAddr: 64 * P, memorySize: P, userspaceAddr: kernel.addressOf(memory) },
  ],
  setUserMemoryRegion2: ({ vm, gmem }) => [
    vm,
    {
      slot: 8,
      flags: 4,
      guestPhysAddr: 64 * P,
      memorySize: P,
      userspaceAddr: 0,
      guestMemfdOffset: 8 * P,
      guestMemfd: gmem,
    },
  ],
  setMemoryAttributes: ({ vm }) => [vm, { address: 0, size: P, attributes: 8, flags: 0 }],
  setMemoryAttributesAsync: ({ vm }) => [vm, { address: 0, size: P, attributes: 8, flags: 0 }],
  setMemoryAttributes2: ({ gmem }) => [gmem, { offset: 0, size: P, attributes: 0, flags: 0 }],
  enableCap: ({ vm }) => [vm, { cap: 168, flags: 0, args: [1, 0, 0, 0] }],
  getDirtyLog: ({ vm }) => [vm, { slot: 0, dirtyBitmap: new Uint8Array(8) }],
  clearDirtyLog: ({ vm }) => [vm, { slot: 0, numPages: 2, firstPage: 0, dirtyBitmap: new Uint8Array(8) }],
  open: () => ['/dev/null', 0, 0],
  fallocate: ({ gmem }) => [gmem, 1, 0, P],
  fallocateAsync: ({ gmem }) => [gmem, 1, 0, P],
  ftruncate: ({ memfd }) => [memfd, P],
  fstat: ({ gmem }) => [gmem, {}],
  fstatfs: ({ gmem }) => [gmem, {}],
  cachestat: ({ gmem }) => [gmem, 0, P, {}],
  fsync: ({ memfd }) => [memfd],
  read: ({ memfd }) => [memfd, new Uint8Array(8)],
  write: ({ memfd }) => [memfd, new Uint8Array(8)],
  pread: ({ memfd }) => [memfd, new Uint8Array(8), 0],
  pwrite: ({ memfd }) => [memfd, new Uint8Array(8), 0],
  lseek: ({ memfd }) => [memfd, 0, 0],
  memfdCreate: () => ['name', 1],
  memfdSecret: () => [uapi.O_CLOEXEC],
  runningVcpus: ({ vm }) => [vm],
  getStatsFd: ({ vm }) => [vm],
  getrlimit: () => [uapi.RLIMIT_MEMLOCK, {}],
  fcntlGetFd: ({ memfd }) => [memfd],
  fcntl: ({ memfd }) => [memfd, uapi.F_GETFD, 0],
  poll: ({ gmem }) => [gmem, 1],
  epollCreate1: () => [uapi.O_CLOEXEC],
  epollCtl: ({ epoll, memfd }) => [epoll, 1, memfd, 1],
  dup: ({ memfd }) => [memfd],
  mmap: ({ memfd }) => [{ length: P, prot: RW, flags: uapi.MAP_SHARED, fd: memfd, offset: 0 }],
  addressOf: ({ memory }) => [memory],
  mprotect: ({ memory }) => [memory, 0, P, RW],
  madvise: ({ memory }) => [memory, 0, P, uapi.MADV_DONTNEED],
  madviseAsync: ({ memory }) => [memory, 0, P, uapi.MADV_DONTNEED],
  mlock: ({ memory }) => [memory, 0, P],
  mlock2: ({ memory }) => [memory, 0, P, uapi.MLOCK_ONFAULT],
  munlock: ({ memory }) => [memory, 0, P],
  msync: ({ memory }) => [memory, 0, P, 1],
  mbind: ({ memory }) => [memory, 0, P, uapi.MPOL_BIND, [0]],
  getMempolicy: ({ memory }) => [memory, 0],
  mincore: ({ memory }) => [memory, 0, 2 * P, new Uint8Array(2)],
  userfaultfd: () => [uapi.O_CLOEXEC],
  uffdioApi: ({ memfd }) => [memfd, 0],
  uffdioRegister: ({ memfd, memory }) => [memfd, memory, 0, P, 1],
  uffdioUnregister: ({ memfd, memory }) => [memfd, memory, 0, P],
  uffdioCopy: ({ memfd, memory }) => [memfd, memory, 0, new Uint8Array(P), 0],
  uffdioZeropage: ({ memfd, memory }) => [memfd, memory, 0, P, 0],
  // What is no userfaultfd is not waited for.
  uffdRead: ({ memfd }) => [memfd, 0, []],
  serveFaults: ({ memfd }) => [memfd, null],
  linkGuestMemfd: ({ vm, gmem }) => [vm, { fd: gmem, flags: 0 }],
  socket: () => [uapi.SOCK_SEQPACKET],
  bind: ({ socket }) => [socket, '@guest-memfd-hostile'],
  listen: ({ socket }) => [socket, 1],
  accept4: ({ socket }) => [socket],
  connect: ({ socket }) => [socket, '@guest-memfd-hostile'],
  sendmsg: ({ socket, memfd }) => [socket, new Uint8Array(8), [memfd]],
  recvmsg: ({ socket }) => [socket, new Uint8Array(8), []],
  unlink: () => ['/nowhere'],
  releaseWindows: ({ memory }) => [memory],
  peek: ({ memory }) => [memory, 0, new Uint8Array(8)],
  poke: ({ memory }) => [memory, 0, new Uint8Array(8)],
  window: ({ memory }) => [memory, 0, P, true],
  releaseWindow: ({ memory }) => [kernel.window(memory, 0, P, true)],
  munmap: ({ memory }) => [memory],
  shareFile: ({ vm }) => [vm],
  takeFile: ({ vm }) => [kernel.shareFile(vm), 'vm'],
  isShared: ({ vm }) => [kernel.shareFile(vm)],
  shareMapping: ({ memory }) => [memory],
  takeMapping: ({ memory }) => [kernel.shareMapping(memory)],
  close: ({ memfd }) => [memfd],
};

const problems: string[] = [];
let calls = 0;
let handles = create();
/** Files that belong to nobody: what calls opened is closed by number. */
const opened: number[] = [];
const opens = new Set([
  'openKvm',
  'createVm',
  'createGuestMemfd',
  'open',
  'memfdCreate',
  'memfdSecret',
  'getStatsFd',
  'epollCreate1',
  'dup',
  'takeFile',
  'userfaultfd',
  'socket',
  'accept4',
  'linkGuestMemfd',
]);

function complain(what: string, why: unknown): void {
  if (problems.length < 60) problems.push(`${what}: ${why instanceof Error ? why.stack : String(why)}`);
}

/** A number ≥ 0, or an errno; a TypeError for what cannot be an argument. */
async function attempt(name: string, what: string, make: () => Arguments): Promise<void> {
  calls++;
  try {
    const args = make();
    const result = await (kernel as unknown as Record<string, (...args: Arguments) => unknown>)[name]?.(...args);
    if (typeof result === 'number') {
      if (!Number.isInteger(result) || result < -4095) complain(`${name}(${what})`, `result ${result}`);
      else if (result >= 0 && opens.has(name)) opened.push(result);
      else if (result >= 0 && (name === 'mmap' || name === 'takeMapping')) kernel.munmap(result);
    } else if (
      !['explain', 'isShared', 'privateGfns', 'privatePages', 'addressOf', 'window', 'releaseWindow'].includes(name)
    ) {
      complain(`${name}(${what})`, `result ${String(result)}`);
    }
  } catch (error) {
    if (!(error instanceof TypeError || error instanceof Mine)) complain(`${name}(${what})`, error);
  }
  for (const fd of opened.splice(0)) kernel.close(fd);
}

// The real kernel's class is the boundary and little else, so it tells whether a row is missing here.
if (isLinux) {
  const names = Object.getOwnPropertyNames(Object.getPrototypeOf(kernel));
  const missing = names.filter((name) => !(name in methods) && name !== 'constructor' && name !== 'adopt');
  if (missing.length > 0) complain('methods without a row here', missing);
}

for (const [name, good] of Object.entries(methods)) {
  const places = good(handles);
  await attempt(name, 'as it should be', () => good(handles));
  close(handles);
  handles = create();
  for (const [label, make] of Object.entries(all)) {
    for (let index = 0; index < places.length; index++) {
      await attempt(name, `argument ${index}: ${label}`, () =>
        places.map((_, at) => (at === index ? make() : good(handles)[at])),
      );
      const place = places[index];
      if (typeof place !== 'object' || place === null || ArrayBuffer.isView(place) || Array.isArray(place)) continue;
      for (const property of Object.keys(place)) {
        await attempt(name, `${property}: ${label}`, () => {
          const args = [...good(handles)];
          args[index] = { ...(args[index] as object), [property]: make() };
          return args;
        });
      }
    }
  }
  close(handles);
  handles = create();
}

// Every kind of fd where another is meant, and numbers that this kernel never gave out: stdout must survive.
const fdFirst = Object.entries(methods).filter(([, good]) => fds(handles).includes(good(handles)[0] as number));
for (const [name, good] of fdFirst) {
  if (name === 'close') continue;
  for (const fd of [...fds(handles), 0, 1, 2, 999, -1])
    await attempt(name, `fd ${fd}`, () => [fd, ...good(handles).slice(1)]);
}
for (const fd of [0, 1, 2]) await attempt('close', `fd ${fd}`, () => [fd]);
close(handles);

// Buffers that a touch would be a signal in, given to every call that reads or writes one.
handles = create();
const { shutMapping, pastEnd, readOnly, memory, memfd, vm } = handles;
const untouchable: Record<string, Uint8Array> = {
  'a file that is not for the host': kernel.window(shutMapping, 0, P),
  'past the end of a file': kernel.window(pastEnd, P, P),
  'across the end of a file': kernel.window(pastEnd, P - 8, P),
  'read-only': kernel.window(readOnly, 0, P),
};
const EFAULT = -14;
for (const [label, buffer] of Object.entries(untouchable)) {
  const reads = label === 'read-only';
  const partly = label.startsWith('across');
  const expect = (what: string, result: number, ...allowed: number[]) => {
    calls++;
    if (!allowed.includes(result)) complain(`${what} with a buffer ${label}`, `result ${result}, not ${allowed}`);
  };
  const some = partly ? [8, EFAULT] : [EFAULT];
  const full = new Uint8Array(P).fill(1);
  kernel.poke(memory, 0, full);
  kernel.lseek(memfd, 0, 0);
  if (isLinux || !reads) {
    expect('peek', kernel.peek(memory, 0, buffer), ...some);
    expect('read', kernel.pread(memfd, buffer, 0), ...some, ...(partly ? [P] : []));
    expect('mincore', kernel.mincore(memory, 0, P, buffer.subarray(partly ? 8 : 0)), EFAULT);
    expect('getDirtyLog', kernel.getDirtyLog(vm, { slot: 0, dirtyBitmap: buffer.subarray(partly ? 8 : 0) }), EFAULT);
  }
  if (!reads) {
    expect('poke', kernel.poke(memory, 0, buffer), ...some);
    expect('write', kernel.pwrite(memfd, buffer, 0), ...some);
    expect(
      'clearDirtyLog',
      kernel.clearDirtyLog(vm, { slot: 0, numPages: 2, firstPage: 0, dirtyBitmap: buffer.subarray(partly ? 8 : 0) }),
      EFAULT,
    );
  }
}
for (const mapping of [shutMapping, pastEnd]) {
  for (const offset of [0, 1, P - 1, P, 2 * P - 1, 2 * P, 3 * P, 2 ** 53 - 1, (1n << 64n) - 1n]) {
    for (const size of [0, 1, P, 2 * P, 1 << 20]) {
      await attempt('peek', `offset ${offset}, ${size} bytes`, () => [mapping, offset, new Uint8Array(size)]);
      await attempt('poke', `offset ${offset}, ${size} bytes`, () => [mapping, offset, new Uint8Array(size)]);
    }
  }
}
close(handles);

process.chdir('/');
rmSync(FOLDER, { recursive: true });
const left = openFiles();
if (left.length > 0) complain('at the end', `open: ${left}`);
console.log(JSON.stringify({ calls, problems }));
