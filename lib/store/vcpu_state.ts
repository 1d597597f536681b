import { systemError } from '../errors.ts';
import type { Kernel } from '../kernel/kernel.ts';
import { armRegisterIds } from '../registers.ts';
import { ERRNO, KVM_GET_REGS, KVM_GET_SREGS, KVM_SET_REGS, KVM_SET_SREGS } from '../uapi.ts';
import type { Vcpu } from '../vcpu.ts';
import type { StoredState, StoredVcpu } from './metadata.ts';

/** The state of a vCPU, saved and put back by the calls its architecture has; what a kernel does not have is left out. */

const KVM_GET_MSRS = 0xc008ae88;
const KVM_SET_MSRS = 0x4008ae89;
const KVM_GET_REG_LIST = 0xc008aeb0;
const REG_LIST_MAX = 4096;

interface Struct {
  readonly get: number;
  readonly set: number;
  readonly size: number;
}

const mpState: Struct = { get: 0x8004ae98, set: 0x4004ae99, size: 4 };
/** In the order in which they are put back: MSRs and events need what the system registers say. */
const x86Structs: readonly Struct[] = [
  { get: 0x81a0ae8c, set: 0x41a0ae8d, size: 416 }, // FPU
  { get: 0x9000aea4, set: 0x5000aea5, size: 4096 }, // XSAVE
  { get: 0x8188aea6, set: 0x4188aea7, size: 392 }, // XCRS
  { get: KVM_GET_SREGS, set: KVM_SET_SREGS, size: 312 },
  { get: KVM_GET_REGS, set: KVM_SET_REGS, size: 144 },
  { get: 0x8080aea1, set: 0x4080aea2, size: 128 }, // DEBUGREGS
  { get: 0x8400ae8e, set: 0x4400ae8f, size: 1024 }, // LAPIC
  mpState,
  { get: 0x8040ae9f, set: 0x4040aea0, size: 64 }, // VCPU_EVENTS
];
/** TSC, SYSENTER_CS, _ESP, _EIP, MISC_ENABLE, PAT, STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, TSC_AUX, the two of kvmclock. */
const msrs: readonly number[] = [
  ...[0x10, 0x174, 0x175, 0x176, 0x1a0, 0x277],
  ...[0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000102, 0xc0000103],
  ...[0x4b564d00, 0x4b564d01],
];
/** A call or a piece of state that this kernel or this vCPU does not have. */
const absent: readonly number[] = [-ERRNO.EINVAL, -ERRNO.ENOTTY, -ERRNO.ENXIO, -ERRNO.ENOENT, -ERRNO.EOPNOTSUPP];

/** @throws KvmError `EBUSY` it runs */
export function saveVcpu({ handle, id }: Vcpu): StoredVcpu {
  const { kernel, fd } = handle;
  // What is known of an exit in the middle of an instruction is outside these structs until the instruction is completed.
  const completed = kernel.run(fd, 0);
  if (completed === -ERRNO.EBUSY) throw systemError(completed, { syscall: 'ioctl', request: 'KVM_RUN' }, null);
  return { id, state: kernel.arch === 'aarch64' ? saveArm(kernel, fd) : saveX86(kernel, fd) };
}

function saveX86(kernel: Kernel, fd: number): StoredState[] {
  const state: StoredState[] = [];
  for (const { get, set, size } of x86Structs) {
    const bytes = new Uint8Array(size);
    if (present(kernel, kernel.ioctlStruct(fd, get, bytes), get)) state.push(ioctl(set, bytes));
  }
  for (const index of msrs) {
    const bytes = new Uint8Array(24);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, 1, true);
    view.setUint32(8, index, true);
    if (kernel.ioctlStruct(fd, KVM_GET_MSRS, bytes) === 1) state.push(ioctl(KVM_SET_MSRS, bytes));
  }
  return state;
}

function saveArm(kernel: Kernel, fd: number): StoredState[] {
  const state: StoredState[] = [];
  for (const number of registerList(kernel, fd)) {
    const bytes = new Uint8Array(2 ** Number((number >> 52n) & 15n));
    if (present(kernel, kernel.getOneReg(fd, number, bytes), 'KVM_GET_ONE_REG'))
      state.push({ call: 'register', number, bytes });
  }
  const bytes = new Uint8Array(mpState.size);
  if (present(kernel, kernel.ioctlStruct(fd, mpState.get, bytes), mpState.get)) state.push(ioctl(mpState.set, bytes));
  return state;
}

function registerList(kernel: Kernel, fd: number): readonly bigint[] {
  const list = new BigUint64Array(1 + REG_LIST_MAX);
  list[0] = BigInt(REG_LIST_MAX);
  const result = kernel.ioctlStruct(fd, KVM_GET_REG_LIST, new Uint8Array(list.buffer));
  return result < 0 ? armRegisterIds : [...list.subarray(1, 1 + Number(list[0]))];
}

/** What may be put back: nothing of a file of the disk decides which other calls are made. */
const writable: ReadonlyMap<bigint, number> = new Map([
  ...x86Structs.map(({ set, size }) => [BigInt(set), size] as const),
  [BigInt(KVM_SET_MSRS), 24],
]);

/** Whether every piece is one that a vCPU of this architecture has. */
export function isVcpuState(state: readonly StoredState[], isArm: boolean): boolean {
  return state.every(({ call, number, bytes }) =>
    call === 'register'
      ? isArm && bytes.length === 2 ** Number((number >> 52n) & 15n)
      : writable.get(number) === bytes.length && (!isArm || number === BigInt(mpState.set)),
  );
}

/** @throws KvmError of the call that is refused: a CPU that lacks what the state needs */
export function loadVcpu({ handle }: Vcpu, state: readonly StoredState[]): void {
  const { kernel, fd } = handle;
  for (const { call, number, bytes } of state) {
    const own = bytes.slice();
    const result = call === 'ioctl' ? kernel.ioctlStruct(fd, Number(number), own) : kernel.setOneReg(fd, number, own);
    if (result >= 0) continue;
    const request = call === 'ioctl' ? `vCPU request 0x${number.toString(16)}` : 'KVM_SET_ONE_REG';
    throw systemError(result, { syscall: 'ioctl', request, args: { number } }, kernel.explain());
  }
}

function ioctl(number: number, bytes: Uint8Array): StoredState {
  return { call: 'ioctl', number: BigInt(number), bytes };
}

function present(kernel: Kernel, result: number, request: number | string): boolean {
  if (result < 0 && !absent.includes(result))
    throw systemError(result, { syscall: 'ioctl', request: `vCPU request ${request}` }, kernel.explain());
  return result >= 0;
}
