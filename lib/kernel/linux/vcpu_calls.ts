import { KvmError } from '../../errors.ts';
import {
  EFD_CLOEXEC,
  ERRNO,
  KVM_CREATE_IRQCHIP,
  KVM_IOEVENTFD,
  KVM_IRQ_LINE,
  KVM_IRQFD,
  KVM_IRQFD_FLAG_RESAMPLE,
} from '../../uapi.ts';
import { bytes, i32, u32, u64 } from '../arguments.ts';
import type { DeviceAttr, Result, U64 } from '../kernel.ts';
import { runRules } from '../rules/vcpu.ts';
import { OpenFile, type VmFile } from '../state.ts';
import { LinuxCalls } from './calls.ts';
import { structRequests } from './struct_requests.ts';

/** 2^62 ns, 146 years: what a longer deadline comes to. */
const LONGEST = 2 ** 62;

/** A vCPU keeps its VM. */
class VcpuFile extends OpenFile {
  readonly vm: VmFile | undefined;
  readonly id: number;
  /** Made when it is asked for. */
  page: Uint8Array | null = null;
  deadlinePassed = false;

  constructor(vm: VmFile | undefined, id: number) {
    super('vcpu');
    this.vm = vm?.hold();
    this.id = id;
  }

  protected override released(): void {
    this.vm?.drop();
  }
}

/** The calls on vCPUs, and those that take a struct of plain data. */
export abstract class VcpuCalls extends LinuxCalls {
  /** By runAsync, on threads of their own. */
  readonly #running = new Set<VcpuFile>();

  createVcpu(vm: number, id: number): Result {
    const number = u32('id', id);
    const owner = this.files.vm(vm);
    this.command.i32(0, this.own(vm)).u64(1, number);
    const fd = this.native.createVcpu();
    if (fd >= 0) owner?.vcpuIds.add(number);
    return this.opened(fd, () => new VcpuFile(owner, number));
  }

  runningVcpus(vm: number): Result {
    const owner = this.files.vm(i32('vm', vm));
    const kind = this.files.get(vm)?.kind;
    // As for any other request of a VM. Contract §2.
    const wrong = kind === 'kvm' || kind === 'vcpu' ? ERRNO.EINVAL : kind ? ERRNO.ENOTTY : ERRNO.EBADF;
    if (kind !== 'vm') return this.answer(-wrong);
    this.command.i32(0, vm);
    const own = [...this.#running].filter((file) => owner && file.vm === owner).length;
    return own + this.native.countRunningElsewhere();
  }

  getStatsFd(fd: number): Result {
    this.command.i32(0, this.own(fd));
    return this.opened(this.native.getStatsFd(), () => new OpenFile('stats'));
  }

  createIrqchip(vm: number): Result {
    return this.answer(this.ioctlWord(this.own(vm), KVM_CREATE_IRQCHIP, 0));
  }

  irqLine(vm: number, irq: number, level: number): Result {
    const line = new Uint8Array(Uint32Array.of(u32('irq', irq), u32('level', level)).buffer);
    return this.answer(this.#struct(this.own(vm), KVM_IRQ_LINE, line, false));
  }

  run(vcpu: number, deadline: number): Result {
    const file = this.#runCommand(vcpu, deadline);
    return this.#ran(file, this.native.run());
  }

  async runAsync(vcpu: number, deadline: number): Promise<Result> {
    const file = this.#runCommand(vcpu, deadline);
    const first = file instanceof VcpuFile && !this.#running.has(file) ? file : null;
    if (first) this.#running.add(first);
    try {
      return this.#ran(file, await this.native.runAsync());
    } finally {
      if (first) this.#running.delete(first);
    }
  }

  deadlinePassed(vcpu: number): boolean {
    const file = this.files.get(i32('vcpu', vcpu));
    return file instanceof VcpuFile && file.deadlinePassed;
  }

  /** Also of a vCPU that another thread of this process created: that is what kicks are for. */
  kick(vcpu: number): Result {
    this.command.i32(0, i32('vcpu', vcpu));
    return this.answer(this.native.kick());
  }

  preFaultMemory(vcpu: number, args: { gpa: bigint; size: bigint; flags: U64 }): Result {
    const [gpa, size, flags] = [u64('gpa', args.gpa), u64('size', args.size), u64('flags', args.flags)];
    this.command.i32(0, this.own(vcpu)).u64(1, gpa).u64(2, size).u64(3, flags);
    const result = this.native.preFaultMemory();
    args.gpa = this.command.result(0);
    args.size = this.command.result(1);
    return this.answer(result);
  }

  runPage(vcpu: number): Uint8Array {
    const file = this.files.get(i32('vcpu', vcpu));
    if (!(file instanceof VcpuFile)) throw new TypeError(`fd ${vcpu} is not a vCPU`);
    if (file.page && file.page.byteLength > 0) return file.page;
    this.command.i32(0, vcpu);
    const buffer = this.native.runPage();
    if (typeof buffer !== 'number') {
      file.page = new Uint8Array(buffer);
      return file.page;
    }
    if (buffer === -ERRNO.EBADF) throw new TypeError(`fd ${vcpu} is a duplicate; the run page goes with the first fd`);
    throw new KvmError({
      code: 'UNSUPPORTED',
      message: 'this JavaScript runtime cannot show memory of the process in an ArrayBuffer, so it cannot run vCPUs',
    });
  }

  ioctlStruct(fd: number, request: number, data: Uint8Array): Result {
    const [number, struct] = [u32('request', request), bytes('data', data)];
    const file = this.files.get(i32('fd', fd));
    const kind = file && structRequests.get(file.kind)?.get(number);
    // Anything else goes without its struct: the kernel says whether it knows the request, and touches no memory.
    if (kind === undefined) return this.answer(this.#withoutStruct(this.own(fd), number));
    if (number === KVM_IRQFD || number === KVM_IOEVENTFD) return this.#eventfdStruct(fd, number, struct.slice());
    return this.answer(this.#struct(fd, number, struct, kind === 'array'));
  }

  getOneReg(vcpu: number, id: U64, value: Uint8Array): Result {
    const target = bytes('value', value);
    this.#oneReg(vcpu, id);
    return this.answer(this.native.getOneReg(target));
  }

  setOneReg(vcpu: number, id: U64, value: Uint8Array): Result {
    const source = bytes('value', value);
    this.#oneReg(vcpu, id);
    return this.answer(this.native.setOneReg(source));
  }

  // ── devices

  createDevice(vm: number, type: number, flags: number): Result {
    const [number, bits] = [u32('type', type), u32('flags', flags)];
    this.command.i32(0, this.own(vm)).i32(1, number).i32(2, bits);
    const result = this.native.createDevice();
    // KVM_CREATE_DEVICE_TEST: only asked.
    return result < 0 || bits & 1 ? this.answer(result) : this.opened(result, () => new OpenFile('device'));
  }

  getDeviceAttr(fd: number, attr: DeviceAttr, value: Uint8Array): Result {
    const target = bytes('value', value);
    this.#deviceAttr(fd, attr);
    return this.answer(this.native.getDeviceAttr(target));
  }

  setDeviceAttr(fd: number, attr: DeviceAttr, value: Uint8Array): Result {
    const source = bytes('value', value);
    this.#deviceAttr(fd, attr);
    return this.answer(this.native.setDeviceAttr(source));
  }

  hasDeviceAttr(fd: number, attr: DeviceAttr): Result {
    this.#deviceAttr(fd, attr);
    return this.answer(this.native.hasDeviceAttr());
  }

  eventfd(initial: number, flags: number): Result {
    this.command.i32(0, u32('initial', initial)).i32(1, i32('flags', flags) | EFD_CLOEXEC);
    return this.opened(this.native.eventfd(), () => new OpenFile('eventfd'));
  }

  // ── what these calls share

  #ran(file: OpenFile | undefined, result: Result): Result {
    if (result >= 0) return result;
    const passed = result === -ERRNO.ETIME;
    if (!(file instanceof VcpuFile)) return this.answer(result);
    file.deadlinePassed = passed;
    const { vm, id } = file;
    // Asked only when the kernel says that it was not.
    return this.refused(passed ? -ERRNO.EINTR : result, runRules, vm && { vm, id, initialised: false }, null);
  }

  #runCommand(vcpu: number, deadline: number): OpenFile | undefined {
    if (typeof deadline !== 'number' || !(deadline >= 0))
      throw new TypeError('deadline must be a number of milliseconds');
    const file = this.files.get(i32('vcpu', vcpu));
    if (file instanceof VcpuFile && file.vm) file.vm.firstRun ??= new Set(file.vm.vcpuIds);
    this.command.i32(0, file ? vcpu : -1).u64(1, Math.min(Math.ceil(deadline * 1e6), LONGEST));
    return file;
  }

  #struct(fd: number, request: number, data: Uint8Array, array: boolean): Result {
    this.command
      .i32(0, fd)
      .i32(1, request)
      .i32(2, array ? 1 : 0);
    return this.native.ioctlStruct(data);
  }

  #withoutStruct(fd: number, request: number): Result {
    const takesStruct = request >>> 30 !== 0 && ((request >>> 8) & 0xff) === 0xae;
    const result = takesStruct || fd < 0 ? this.ioctlWord(fd, request, 0) : -ERRNO.EINVAL;
    return result < 0 ? result : -ERRNO.EFAULT;
  }

  /** The eventfds that the struct names must be ours; `struct` is a copy, so they stay what they are. */
  #eventfdStruct(fd: number, request: number, struct: Uint8Array): Result {
    const word = (index: number): number => new DataView(struct.buffer).getInt32(4 * index, true);
    const isOurs = (eventfd: number): boolean => this.files.get(eventfd)?.kind === 'eventfd';
    const wide = struct.length >= ((request >>> 16) & 0x3fff);
    const named = request === KVM_IOEVENTFD ? [5] : wide && word(2) & KVM_IRQFD_FLAG_RESAMPLE ? [0, 3] : [0];
    if (wide && !named.every((index) => isOurs(word(index)))) return this.answer(-ERRNO.EBADF);
    return this.answer(this.#struct(fd, request, struct, false));
  }

  #oneReg(vcpu: number, id: U64): void {
    const register = u64('id', id);
    this.command.i32(0, this.files.get(i32('vcpu', vcpu))?.kind === 'vcpu' ? vcpu : -1).u64(1, register);
  }

  #deviceAttr(fd: number, attr: DeviceAttr): void {
    const [flags, group, number] = [u32('flags', attr.flags), u32('group', attr.group), u64('attr', attr.attr)];
    this.command.i32(0, this.own(fd)).i32(1, flags).i32(2, group).u64(3, number);
  }
}
