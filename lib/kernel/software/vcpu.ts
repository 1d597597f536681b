import { ERRNO, KVM_EXIT } from '../../uapi.ts';
import { OpenFile, type VmFile } from '../state.ts';
import type { Executor, Stop } from './executor.ts';
import { exitCounter, vcpuCounters } from './statistics.ts';

/** Offsets in kvm_run. Contract §1.2. */
export const KVM_RUN = {
  immediateExit: 1,
  exitReason: 8,
  union: 32,
  io: { direction: 32, size: 33, port: 34, count: 36, dataOffset: 40 },
} as const;

/** Where the bytes of a port access are, counted from kvm_run: in the page behind it. */
const IO_DATA = 4096;

/** A virtual CPU of the software kernel: its registers as the structs that user space reads and writes, and its kvm_run. */
export class SoftwareVcpu extends OpenFile {
  readonly vm: VmFile;
  readonly id: number;
  /** kvm_run and the pages behind it. */
  readonly page: Uint8Array<ArrayBuffer>;
  /** By request number of the ioctl that reads them: KVM_GET_REGS, KVM_GET_SREGS, … */
  readonly structs = new Map<number, Uint8Array>();
  readonly msrs = new Map<number, bigint>();
  /** arm64: registers by their ONE_REG id. */
  readonly registers = new Map<bigint, Uint8Array>();
  /** arm64: KVM_ARM_VCPU_INIT was called. */
  initialised: boolean;
  executor: Executor | null = null;
  /** A kick that no run has seen yet. */
  kicked = false;
  running = false;
  /** The deadline ended the latest run that did not end with an exit. */
  deadlinePassed = false;
  /** The last exit, when the guest waits for the host's answer to it. */
  pending: Stop | null = null;
  /** The answer, from when a run took it until the guest goes on with it. */
  answer: Uint8Array | bigint | null = null;
  /** How often things happened, by the names that Linux has for them. */
  readonly statistics: Record<string, number>;
  readonly #view: DataView;

  constructor(vm: VmFile, id: number, pages: number) {
    super('vcpu');
    this.vm = vm;
    this.id = id;
    this.page = new Uint8Array(pages * vm.machine.pageSize);
    this.#view = new DataView(this.page.buffer);
    this.initialised = !vm.machine.isArm;
    this.statistics = vcpuCounters(vm.machine.isArm);
    vm.vcpuIds.add(id);
    vm.hold();
  }

  protected override released(): void {
    this.vm.drop();
    // As the real page is unmapped: whoever still has it sees nothing any more.
    const { buffer } = this.page;
    structuredClone(buffer, { transfer: [buffer] });
  }

  /** Writes an exit into kvm_run. @returns what KVM_RUN returns. Contract §13.1, §13.2. */
  exit(stop: Stop): number {
    const { page, statistics } = this;
    const view = this.#view;
    for (const name of ['exits', exitCounter(stop, this.vm.machine.isArm)])
      if (name !== null) statistics[name] = (statistics[name] ?? 0) + 1;
    this.pending = stop.kind === 'io' || stop.kind === 'mmio' || stop.kind === 'hypercall' ? stop : null;
    switch (stop.kind) {
      case 'io':
        view.setUint32(KVM_RUN.exitReason, KVM_EXIT.IO, true);
        view.setUint8(KVM_RUN.io.direction, stop.direction === 'out' ? 1 : 0);
        view.setUint8(KVM_RUN.io.size, stop.size);
        view.setUint16(KVM_RUN.io.port, stop.port, true);
        view.setUint32(KVM_RUN.io.count, stop.data.length / stop.size, true);
        view.setBigUint64(KVM_RUN.io.dataOffset, BigInt(IO_DATA), true);
        page.set(stop.data, IO_DATA);
        return 0;
      case 'mmio':
        view.setUint32(KVM_RUN.exitReason, KVM_EXIT.MMIO, true);
        view.setBigUint64(32, BigInt(stop.gpa), true);
        page.fill(0, 40, 48);
        page.set(stop.data.subarray(0, 8), 40);
        view.setUint32(48, stop.data.length, true);
        view.setUint8(52, stop.isWrite ? 1 : 0);
        return 0;
      case 'hypercall':
        view.setUint32(KVM_RUN.exitReason, KVM_EXIT.HYPERCALL, true);
        view.setBigUint64(32, stop.number, true);
        // What is beyond the call's arguments keeps its old bytes. Contract §15.
        for (const [index, value] of stop.args.entries()) view.setBigUint64(40 + 8 * index, value, true);
        view.setBigUint64(88, 0n, true);
        view.setBigUint64(96, stop.longMode ? 1n : 0n, true);
        return 0;
      case 'fault':
        view.setUint32(KVM_RUN.exitReason, stop.fault ? KVM_EXIT.MEMORY_FAULT : KVM_EXIT.UNKNOWN, true);
        if (stop.fault) this.describeFault(stop.fault);
        return -stop.errno;
      case 'hlt':
        view.setUint32(KVM_RUN.exitReason, KVM_EXIT.HLT, true);
        return 0;
      case 'shutdown':
        view.setUint32(KVM_RUN.exitReason, KVM_EXIT.SHUTDOWN, true);
        return 0;
      case 'system-event':
        view.setUint32(KVM_RUN.exitReason, KVM_EXIT.SYSTEM_EVENT, true);
        view.setUint32(32, stop.type, true);
        view.setUint32(36, 0, true);
        return 0;
      case 'internal-error':
        view.setUint32(KVM_RUN.exitReason, KVM_EXIT.INTERNAL_ERROR, true);
        view.setUint32(32, stop.suberror, true);
        view.setUint32(36, 0, true);
        return 0;
      case 'deadline':
        view.setUint32(KVM_RUN.exitReason, KVM_EXIT.INTR, true);
        return -ERRNO.EINTR;
    }
  }

  /** The memory_fault member of kvm_run: one page, and whether the access was private. */
  describeFault({ gpa, private: secret }: { readonly gpa: number; readonly private: boolean }): void {
    const { pageSize } = this.vm.machine;
    this.#view.setUint32(KVM_RUN.exitReason, KVM_EXIT.MEMORY_FAULT, true);
    this.#view.setBigUint64(32, secret ? 8n : 0n, true);
    this.#view.setBigUint64(40, BigInt(gpa - (gpa % pageSize)), true);
    this.#view.setBigUint64(48, BigInt(pageSize), true);
  }

  /** Takes the host's answer to the pending exit. It counts as given, also when the run that takes it ends at once. */
  complete(): void {
    const { pending } = this;
    if (!pending) return;
    this.pending = null;
    if (pending.kind === 'hypercall') this.answer = this.#view.getBigUint64(88, true);
    else if (pending.kind === 'io') this.answer = this.page.slice(IO_DATA, IO_DATA + pending.data.length);
    else this.answer = pending.kind === 'mmio' ? this.page.slice(40, 40 + pending.data.length) : null;
  }

  get immediateExit(): boolean {
    return this.page[KVM_RUN.immediateExit] !== 0;
  }
}
