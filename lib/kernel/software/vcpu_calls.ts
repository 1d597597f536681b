import { hex } from '../../format.ts';
import { ERRNO, KVM_RUN } from '../../uapi.ts';
import { bytes, i32, isAligned, isZero, toPages, u32, u64, wraps } from '../arguments.ts';
import type { DeviceAttr, Result, U64 } from '../kernel.ts';
import { runRules } from '../rules/vcpu.ts';
import { VmFile } from '../state.ts';
import type { ExecutorFactory, GuestBus } from './executor.ts';
import { SoftwareBus } from './guest_bus.ts';
import { MappingCalls } from './mapping_calls.ts';
import { StatsFile } from './software_files.ts';
import { statisticsFile } from './statistics.ts';
import { SoftwareVcpu } from './vcpu.ts';
import { resetStructs, variableSize, vcpuStructs } from './vcpu_state.ts';

/** arm64: as many as a GICv3 serves. */
const MAX_VCPU_ID = { x86_64: 4096, aarch64: 512 };
const KVM_ARM_VCPU_INIT = 0x4020aeae;
const KVM_ARM_PREFERRED_TARGET = 0x8020aeaf;
const KVM_ARM_TARGET_GENERIC_V8 = 5;

/** The system calls on vCPUs. */
export abstract class VcpuCalls extends MappingCalls {
  readonly #executors: ExecutorFactory[] = [];
  /** How many vCPUs of a VM run. */
  readonly #running = new WeakMap<VmFile, number>();

  /** Adds a way to carry out guest code; the first that takes a vCPU's code runs it. */
  addExecutor(factory: ExecutorFactory): void {
    this.#executors.push(factory);
  }

  createVcpu(vm: number, id: number): Result {
    const number = u32('id', id);
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    const limit = MAX_VCPU_ID[this.arch];
    if (number >= limit) return this.refuse('EINVAL', `a vCPU id is below ${limit}, not ${number}`);
    if (owner.vcpuIds.has(number)) return this.refuse('EEXIST', `the VM has a vCPU ${number} already`);
    return this.install(() => {
      const vcpu = new SoftwareVcpu(owner, number, this.machine.isArm ? 2 : 3);
      resetStructs(vcpu);
      return vcpu;
    });
  }

  createIrqchip(vm: number): Result {
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    return this.refuse(
      this.machine.isArm ? 'EINVAL' : 'ENOTTY',
      'the software kernel has no interrupt controller: its guests run without interrupts',
    );
  }

  irqLine(vm: number, irq: number, level: number): Result {
    u32('irq', irq);
    u32('level', level);
    const owner = this.vm(vm);
    return typeof owner === 'number' ? owner : this.refuse('ENXIO', 'the VM has no interrupt controller');
  }

  run(vcpu: number, deadline: number): Result {
    if (typeof deadline !== 'number' || !(deadline >= 0))
      throw new TypeError('deadline must be a number of milliseconds');
    const cpu = this.#vcpu(vcpu);
    if (typeof cpu === 'number') return cpu;
    if (cpu.running) return this.refuse('EBUSY', 'the vCPU runs already');
    const refused = this.check(runRules, cpu, null);
    if (refused !== null) return refused;
    const end = performance.now() + deadline;
    const bus = new SoftwareBus(cpu.vm, this.memory);
    cpu.vm.firstRun ??= new Set(cpu.vm.vcpuIds);
    cpu.complete();
    // An answered exit is completed even when the run ends at once. Contract §13.1.
    if (cpu.kicked || cpu.immediateExit || deadline === 0) {
      cpu.deadlinePassed = !cpu.kicked && !cpu.immediateExit;
      cpu.kicked = false;
      return this.refuse('EINTR', 'the vCPU was kicked, or has no time');
    }
    const { answer } = cpu;
    cpu.answer = null;
    cpu.executor ??=
      this.#executors.map((factory) => factory.open(cpu, bus)).find((executor) => executor !== null) ?? null;
    if (!cpu.executor) {
      const advice = this.#executors.map((factory) => factory.advice).find((text) => text !== undefined);
      return this.refuse('EOPNOTSUPP', `not the agent's code: ${advice ?? 'use KVM'}`);
    }
    cpu.running = true;
    this.#ran(cpu.vm, 1);
    try {
      const result = cpu.exit(
        cpu.executor.run(cpu, bus, answer, () => cpu.kicked || cpu.immediateExit || performance.now() >= end),
      );
      this.#countFaults(cpu, bus);
      this.exited(cpu.vm, bus);
      if (result === -ERRNO.EINTR) {
        cpu.deadlinePassed = !cpu.kicked && !cpu.immediateExit;
        cpu.kicked = false;
      }
      return this.answer(result);
    } finally {
      cpu.running = false;
      this.#ran(cpu.vm, -1);
    }
  }

  /** The guest runs at once, and its vCPU counts as running until its caller hears of it. */
  async runAsync(vcpu: number, deadline: number): Promise<Result> {
    const cpu = this.#vcpu(vcpu);
    const result = this.run(vcpu, deadline);
    if (typeof cpu === 'number') return result;
    this.#ran(cpu.vm, 1);
    await null;
    this.#ran(cpu.vm, -1);
    return result;
  }

  runningVcpus(vm: number): Result {
    const owner = this.vm(vm);
    return typeof owner === 'number' ? owner : this.runningOf(owner);
  }

  getStatsFd(fd: number): Result {
    const file = this.file(i32('fd', fd));
    const cpu = file instanceof SoftwareVcpu ? this.#vcpu(fd) : null;
    const owner = cpu === null ? this.vm(fd) : cpu;
    if (typeof owner === 'number') return owner;
    // The model counts what a vCPU does; a VM has nothing to tell.
    const [name, counters] =
      owner instanceof SoftwareVcpu ? [`kvm-0/vcpu-${owner.id}`, owner.statistics] : ['kvm-0', {}];
    return this.install(() => new StatsFile(() => statisticsFile(name, counters)));
  }

  deadlinePassed(vcpu: number): boolean {
    const cpu = this.#vcpu(vcpu);
    return typeof cpu !== 'number' && cpu.deadlinePassed;
  }

  kick(vcpu: number): Result {
    const cpu = this.#vcpu(vcpu);
    if (typeof cpu === 'number') return cpu;
    cpu.kicked = true;
    return 0;
  }

  /** Contract §14. */
  preFaultMemory(vcpu: number, args: { gpa: bigint; size: bigint; flags: U64 }): Result {
    const request = { gpa: u64('gpa', args.gpa), size: u64('size', args.size), flags: u64('flags', args.flags) };
    const cpu = this.#vcpu(vcpu, true);
    if (typeof cpu === 'number') return cpu;
    const { machine } = this;
    if (machine.isArm || !machine.since('6.11'))
      return this.refuse('EINVAL', 'this kernel has no KVM_PRE_FAULT_MEMORY');
    if (!isZero(request.flags)) return this.refuse('EINVAL', 'flags are not 0');
    const whole = isAligned(request.gpa, this.pageSize) && isAligned(request.size, this.pageSize);
    if (!whole || isZero(request.size) || wraps(request.gpa, request.size))
      return this.refuse('EINVAL', 'the range is not made of whole pages');
    if (!machine.tdp && !cpu.vm.hadSlots)
      return this.refuse('ENOSPC', 'a VM without memslots has no room for page tables');
    if (!machine.tdp) return this.refuse('EOPNOTSUPP', 'the host has no hardware paging for guests');
    const bus = new SoftwareBus(cpu.vm, this.memory);
    const pages = toPages(request.size, this.pageSize);
    let done = 0;
    let errno = 0;
    for (; done < pages && errno === 0; done += errno === 0 ? 1 : 0) {
      const access = bus.preFault(Number(request.gpa) + done * this.pageSize);
      if (access.kind === 'mmio') errno = ERRNO.ENOENT;
      if (access.kind !== 'fault') continue;
      errno = access.errno;
      if (access.fault) cpu.describeFault(access.fault);
    }
    args.gpa = BigInt(request.gpa) + BigInt(done * this.pageSize);
    args.size = BigInt(request.size) - BigInt(done * this.pageSize);
    return done > 0 || errno === 0 ? 0 : this.answer(-errno);
  }

  runPage(vcpu: number): Uint8Array {
    const cpu = this.#vcpu(vcpu);
    if (typeof cpu === 'number') throw new TypeError(`fd ${vcpu} is not a vCPU`);
    return cpu.page;
  }

  getOneReg(vcpu: number, id: U64, value: Uint8Array): Result {
    return this.#oneReg(vcpu, id, value, (cpu, register, target) =>
      target.set(cpu.registers.get(register) ?? new Uint8Array(target.length)),
    );
  }

  setOneReg(vcpu: number, id: U64, value: Uint8Array): Result {
    return this.#oneReg(vcpu, id, value, (cpu, register, source) => {
      cpu.registers.set(register, source.slice());
      cpu.executor = null;
    });
  }

  createDevice(vm: number, type: number, flags: number): Result {
    u32('type', type);
    u32('flags', flags);
    const owner = this.vm(vm);
    return typeof owner === 'number' ? owner : this.refuse('ENODEV', 'the software kernel has no devices');
  }

  getDeviceAttr(fd: number, attr: DeviceAttr, value: Uint8Array): Result {
    bytes('value', value);
    return this.hasDeviceAttr(fd, attr);
  }

  setDeviceAttr(fd: number, attr: DeviceAttr, value: Uint8Array): Result {
    bytes('value', value);
    return this.hasDeviceAttr(fd, attr);
  }

  hasDeviceAttr(fd: number, attr: DeviceAttr): Result {
    const { flags, group, attr: number } = attr;
    u32('flags', flags);
    u32('group', group);
    u64('attr', number);
    return this.file(i32('fd', fd))
      ? this.refuse('ENXIO', 'the software kernel has no device attributes')
      : this.badFd(fd);
  }

  ioctlStruct(fd: number, request: number, data: Uint8Array): Result {
    const [number, struct] = [u32('request', request), bytes('data', data)];
    const size = (number >>> 16) & 0x3fff;
    if (number === KVM_ARM_PREFERRED_TARGET) return this.#preferredTarget(fd, struct);
    const cpu = this.#vcpu(fd);
    if (typeof cpu === 'number') return cpu;
    if (struct.length < size) return this.refuse('EFAULT', `the struct has ${size} bytes, the buffer ${struct.length}`);
    if (number === KVM_ARM_VCPU_INIT && this.machine.isArm) {
      cpu.initialised = true;
      return 0;
    }
    const kind = vcpuStructs(this.machine.isArm).get(number);
    if (!kind) return this.refuse('EINVAL', `the software kernel has no vCPU request ${hex(number)}`);
    const handled = variableSize(cpu, number, struct);
    if (handled !== null) return this.answer(handled);
    const stored = cpu.structs.get(kind.reads) ?? new Uint8Array(size);
    if (kind.reads === number) struct.set(stored.subarray(0, size));
    else {
      cpu.structs.set(kind.reads, struct.slice(0, size));
      // New registers may point at other code.
      cpu.executor = null;
    }
    return 0;
  }

  /** A request by number, whose argument is no address. */
  protected vcpuIoctl(fd: number, request: number): Result {
    const cpu = this.#vcpu(fd);
    if (typeof cpu === 'number') return cpu;
    if (request === KVM_RUN) return this.refuse('EINVAL', 'a run needs a deadline: call run');
    return vcpuStructs(this.machine.isArm).has(request) || (request === KVM_ARM_VCPU_INIT && this.machine.isArm)
      ? this.refuse('EFAULT', 'the argument is not a readable address')
      : this.refuse('EINVAL', `vCPUs have no request ${hex(request)}`);
  }

  /** struct kvm_vcpu_init: the generic ARMv8 target, and no features. */
  #preferredTarget(vm: number, struct: Uint8Array): Result {
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    if (!this.machine.isArm) return this.refuse('ENOTTY', 'x86 vCPUs have no target');
    if (struct.length < 32) return this.refuse('EFAULT', 'struct kvm_vcpu_init has 32 bytes');
    struct.fill(0, 0, 32);
    struct[0] = KVM_ARM_TARGET_GENERIC_V8;
    return 0;
  }

  protected runningOf(vm: VmFile): number {
    return this.#running.get(vm) ?? 0;
  }

  #ran(vm: VmFile, more: number): void {
    this.#running.set(vm, (this.#running.get(vm) ?? 0) + more);
  }

  #countFaults({ statistics }: SoftwareVcpu, { faults }: SoftwareBus): void {
    for (const name of ['pf_taken', 'pf_fixed']) statistics[name] = (statistics[name] ?? 0) + faults;
  }

  #oneReg(
    vcpu: number,
    id: U64,
    value: Uint8Array,
    move: (cpu: SoftwareVcpu, id: bigint, value: Uint8Array) => void,
  ): Result {
    const [register, plain] = [BigInt(u64('id', id)), bytes('value', value)];
    const cpu = this.#vcpu(vcpu);
    if (typeof cpu === 'number') return cpu;
    if (!this.machine.isArm) return this.refuse('EINVAL', 'x86 registers are read with KVM_GET_REGS and KVM_GET_SREGS');
    if (!cpu.initialised) return this.refuse('ENOEXEC', 'the vCPU needs KVM_ARM_VCPU_INIT first');
    const size = 1 << Number((register >> 52n) & 15n);
    if (size > 2048 || plain.length < size)
      return this.refuse('EFAULT', `the register has ${size} bytes, the buffer ${plain.length}`);
    move(cpu, register, plain.subarray(0, size));
    return 0;
  }

  protected abstract vm(fd: number): VmFile | Result;

  #vcpu(fd: number, ioctl = false): SoftwareVcpu | Result {
    const file = this.file(i32('vcpu', fd));
    if (!file) return this.badFd(fd);
    // Contract §2.2: what a fd of another kind says to a request it does not know.
    if (ioctl && file.kind === 'kvm')
      return this.refuse('EINVAL', '/dev/kvm has no such request: it is one of vCPU fds');
    if (ioctl && file instanceof VmFile) {
      if (!this.isOwn(file)) return this.refuse('EIO', 'the VM belongs to another process');
      return this.refuse(
        this.machine.isArm ? 'EINVAL' : 'ENOTTY',
        'VM fds have no such request: it is one of vCPU fds',
      );
    }
    if (!(file instanceof SoftwareVcpu)) return this.refuse('ENOTTY', `fd ${fd} is not a vCPU`);
    return this.isOwn(file.vm) ? file : this.refuse('EIO', 'the VM belongs to another process');
  }

  protected abstract isOwn(vm: VmFile): boolean;

  /** A guest has come back to the host. */
  protected exited(_vm: VmFile, _bus: GuestBus): void {}
}
