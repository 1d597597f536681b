import { KVM_GET_REGS, KVM_GET_SREGS, KVM_REGS } from '../../uapi.ts';
import type { Access, GuestBus } from './executor.ts';
import { UC, type UnicornEngine } from './unicorn_engine.ts';
import type { SoftwareVcpu } from './vcpu.ts';

/** The physical address behind a linear one; null where the guest's tables map nothing; or why a table cannot be read. */
export type Translation = number | null | Exclude<Access, { kind: 'ok' }>;

/** The registers of a vCPU on their way into an engine and back. */
export interface UnicornCpu {
  readonly arch: number;
  readonly mode: number;
  /** Linear address of the next instruction. */
  readonly pc: bigint;
  load(engine: UnicornEngine): void;
  /** @param pc Linear address of the next instruction, where it is not what the engine's register says. */
  store(engine: UnicornEngine, pc: bigint | null): void;
  translate(address: bigint, bus: GuestBus): Translation;
}

/** The CPU in its present mode; null in one that cannot be carried over. */
export function unicornCpu(vcpu: SoftwareVcpu): UnicornCpu | null {
  if (vcpu.vm.machine.isArm) return Arm64Cpu.of(vcpu);
  return X86Cpu.of(vcpu);
}

/** Numbers of Unicorn's registers, in the order of struct kvm_regs without rip and rflags. */
const X86_32 = [19, 21, 22, 24, 29, 23, 30, 20] as const;
const X86_64 = [35, 37, 38, 40, 43, 39, 44, 36, 106, 107, 108, 109, 110, 111, 112, 113] as const;
const [X86_EIP, X86_RIP, X86_EFLAGS] = [26, 41, 25] as const;
/** cs, ds, es, fs, gs, ss: the order of struct kvm_sregs. */
const X86_SEGMENTS = [11, 17, 28, 32, 33, 49] as const;
const [X86_CR0, X86_CR2, X86_CR3, X86_CR4] = [50, 52, 53, 54] as const;
const [X86_IDTR, X86_GDTR, X86_FS_BASE, X86_GS_BASE, X86_XMM0, X86_MXCSR] = [242, 243, 250, 251, 122, 249] as const;

const KVM_GET_FPU = 0x81a0ae8c;
const REGS = { rip: 8 * KVM_REGS.indexOf('rip'), rflags: 8 * KVM_REGS.indexOf('rflags') } as const;
/** Offsets in struct kvm_sregs, kvm_segment and kvm_fpu. */
const SREGS = { gdt: 192, idt: 208, cr0: 224, cr2: 232, cr3: 240, cr4: 248, efer: 264 } as const;
const SEGMENT = { size: 24, limit: 8, selector: 12, type: 14, db: 17, l: 19, fs: 3, gs: 4 } as const;
const FPU = { size: 416, xmm: 152, mxcsr: 408 } as const;
const CR0 = { PE: 1n, PG: 1n << 31n } as const;
const CR4 = { PSE: 1n << 4n, PAE: 1n << 5n, LA57: 1n << 12n } as const;
const EFER_LMA = 1n << 10n;
const PRESENT = 1n;
const LARGE = 1n << 7n;
const FRAME = 0x000f_ffff_ffff_f000n;

export class X86Cpu implements UnicornCpu {
  readonly arch = UC.x86;
  readonly mode: number;
  readonly #regs: DataView;
  readonly #sregs: DataView;
  readonly #vcpu: SoftwareVcpu;
  readonly #selectors: bigint[] = [];
  #cr0 = 0n;

  static of(vcpu: SoftwareVcpu): X86Cpu | null {
    const cpu = new X86Cpu(vcpu);
    return cpu.#fits() ? cpu : null;
  }

  constructor(vcpu: SoftwareVcpu) {
    this.#vcpu = vcpu;
    this.#regs = struct(vcpu, KVM_GET_REGS, 144);
    this.#sregs = struct(vcpu, KVM_GET_SREGS, 312);
    const { real, protected: flat, long } = UC.mode;
    this.mode = !(this.cr0 & CR0.PE) ? real : this.#efer & EFER_LMA && this.#sregs.getUint8(SEGMENT.l) ? long : flat;
  }

  get pc(): bigint {
    return this.codeBase + this.#regs.getBigUint64(REGS.rip, true);
  }

  get cr0(): bigint {
    return this.#sregs.getBigUint64(SREGS.cr0, true);
  }

  get codeBase(): bigint {
    return this.mode === UC.mode.long ? 0n : this.base(0);
  }

  base(segment: number): bigint {
    return this.#sregs.getBigUint64(SEGMENT.size * segment, true);
  }

  get interruptTable(): { readonly base: bigint; readonly limit: number } {
    return {
      base: this.#sregs.getBigUint64(SREGS.idt, true),
      limit: this.#sregs.getUint16(SREGS.idt + 8, true),
    };
  }

  load(engine: UnicornEngine): void {
    const registers = this.#general;
    for (const [index, number] of registers.entries())
      engine.setRegister(number, this.#regs.getBigUint64(8 * index, true));
    engine.setRegister(X86_EFLAGS, this.#regs.getBigUint64(REGS.rflags, true) & 0xffff_ffffn);
    this.#loadTable(engine, X86_GDTR, SREGS.gdt);
    this.#loadTable(engine, X86_IDTR, SREGS.idt);
    engine.setRegister(X86_CR2, this.#sregs.getBigUint64(SREGS.cr2, true));
    if (this.mode === UC.mode.real)
      for (const [index, number] of X86_SEGMENTS.entries()) engine.setRegister(number, this.base(index) >> 4n);
    else {
      engine.setRegister(X86_CR3, this.#sregs.getBigUint64(SREGS.cr3, true));
      engine.setRegister(X86_CR4, this.#sregs.getBigUint64(SREGS.cr4, true));
    }
    if (this.mode === UC.mode.long) {
      engine.setRegister(X86_FS_BASE, this.base(SEGMENT.fs));
      engine.setRegister(X86_GS_BASE, this.base(SEGMENT.gs));
    }
    const fpu = this.#vcpu.structs.get(KVM_GET_FPU);
    if (fpu) {
      for (let index = 0; index < this.#vectors; index++)
        engine.setBytes(X86_XMM0 + index, fpu.subarray(FPU.xmm + 16 * index, FPU.xmm + 16 * index + 16));
      engine.setBytes(X86_MXCSR, fpu.subarray(FPU.mxcsr, FPU.mxcsr + 4));
    }
    this.#selectors.push(...X86_SEGMENTS.map((number) => engine.register(number) & 0xffffn));
    this.#cr0 = engine.register(X86_CR0);
  }

  store(engine: UnicornEngine, pc: bigint | null): void {
    for (const [index, number] of this.#general.entries())
      this.#regs.setBigUint64(8 * index, engine.register(number), true);
    this.#regs.setBigUint64(REGS.rflags, engine.register(X86_EFLAGS) & 0xffff_ffffn, true);
    this.#storeTable(engine, X86_GDTR, SREGS.gdt);
    this.#storeTable(engine, X86_IDTR, SREGS.idt);
    for (const [index, number] of X86_SEGMENTS.entries()) {
      const selector = engine.register(number) & 0xffffn;
      if (selector === this.#selectors[index]) continue;
      this.#sregs.setUint16(SEGMENT.size * index + SEGMENT.selector, Number(selector), true);
      if (this.mode === UC.mode.real) this.#sregs.setBigUint64(SEGMENT.size * index, selector << 4n, true);
    }
    if (this.mode !== UC.mode.real) this.#sregs.setBigUint64(SREGS.cr3, engine.register(X86_CR3), true);
    if (this.mode === UC.mode.long) {
      this.#sregs.setBigUint64(SEGMENT.size * SEGMENT.fs, engine.register(X86_FS_BASE), true);
      this.#sregs.setBigUint64(SEGMENT.size * SEGMENT.gs, engine.register(X86_GS_BASE), true);
    }
    let fpu = this.#vcpu.structs.get(KVM_GET_FPU);
    if (!fpu) {
      fpu = new Uint8Array(FPU.size);
      this.#vcpu.structs.set(KVM_GET_FPU, fpu);
    }
    for (let index = 0; index < this.#vectors; index++)
      engine.bytes(X86_XMM0 + index, fpu.subarray(FPU.xmm + 16 * index, FPU.xmm + 16 * index + 16));
    engine.bytes(X86_MXCSR, fpu.subarray(FPU.mxcsr, FPU.mxcsr + 4));
    const rip = pc === null ? engine.register(this.mode === UC.mode.long ? X86_RIP : X86_EIP) : pc - this.codeBase;
    this.#regs.setBigUint64(REGS.rip, BigInt.asUintN(this.mode === UC.mode.long ? 64 : 32, rip), true);
  }

  /** The guest has switched to other page tables. */
  changedTables(engine: UnicornEngine): boolean {
    return this.mode !== UC.mode.real && engine.register(X86_CR3) !== this.#sregs.getBigUint64(SREGS.cr3, true);
  }

  /** The guest has switched to a mode that this engine does not run. */
  changedMode(engine: UnicornEngine): boolean {
    return ((engine.register(X86_CR0) ^ this.#cr0) & (CR0.PE | CR0.PG)) !== 0n;
  }

  /** What an `in` that is no string instruction read. */
  setAccumulator(size: number, value: number): void {
    const whole = this.#regs.getBigUint64(0, true);
    const mask = (1n << BigInt(8 * size)) - 1n;
    this.#regs.setBigUint64(0, size === 4 ? BigInt(value) : (whole & ~mask) | BigInt(value), true);
  }

  /** Puts a string instruction `ins` back to where it was before its port access. */
  rewind(size: number, repeated: boolean, wide: boolean): void {
    const [rcx, rdi] = [8 * KVM_REGS.indexOf('rcx'), 8 * KVM_REGS.indexOf('rdi')];
    const backwards = this.#regs.getBigUint64(REGS.rflags, true) & 0x400n;
    const add = (register: number, delta: bigint): void => {
      const old = this.#regs.getBigUint64(register, true);
      const bits = this.mode === UC.mode.long ? 64 : (this.mode === UC.mode.real) !== wide ? 16 : 32;
      const low = BigInt.asUintN(bits, old + delta);
      this.#regs.setBigUint64(register, ((old >> BigInt(bits)) << BigInt(bits)) | low, true);
    };
    add(rdi, backwards ? BigInt(size) : -BigInt(size));
    if (repeated) add(rcx, 1n);
  }

  /** Real mode: pushes flags, cs and ip, and goes on at an interrupt's vector. @returns false where there is no such vector. */
  interrupt(vector: number, bus: GuestBus): boolean {
    const { base, limit } = this.interruptTable;
    const entry = new Uint8Array(4);
    if (4 * vector + 3 > limit || bus.read(Number(base) + 4 * vector, entry).kind !== 'ok') return false;
    const target = new DataView(entry.buffer);
    const rsp = 8 * KVM_REGS.indexOf('rsp');
    const flags = this.#regs.getUint16(REGS.rflags, true);
    const frame = [flags, this.#sregs.getUint16(SEGMENT.selector, true), this.#regs.getUint16(REGS.rip, true)];
    for (const value of frame) {
      const sp = (this.#regs.getUint16(rsp, true) - 2) & 0xffff;
      this.#regs.setUint16(rsp, sp, true);
      if (bus.write(Number(this.base(5)) + sp, Uint8Array.of(value & 255, value >> 8)).kind !== 'ok') return false;
    }
    // The trap and interrupt flags are cleared.
    this.#regs.setUint16(REGS.rflags, flags & ~0x300, true);
    this.#regs.setBigUint64(REGS.rip, BigInt(target.getUint16(0, true)), true);
    this.#sregs.setUint16(SEGMENT.selector, target.getUint16(2, true), true);
    this.#sregs.setBigUint64(0, BigInt(target.getUint16(2, true)) << 4n, true);
    return true;
  }

  translate(address: bigint, bus: GuestBus): Translation {
    if (!(this.cr0 & CR0.PG)) return Number(address);
    const cr3 = this.#sregs.getBigUint64(SREGS.cr3, true);
    const cr4 = this.#sregs.getBigUint64(SREGS.cr4, true);
    if (this.#efer & EFER_LMA) return walk(address, cr3 & FRAME, [39, 30, 21, 12], 8, bus);
    if (cr4 & CR4.PAE) return walk(address, cr3 & 0xffff_ffe0n, [30, 21, 12], 8, bus);
    return walk(address, cr3 & 0xffff_f000n, [22, 12], 4, bus);
  }

  /** Real mode with segments that real mode could have loaded, flat protected mode, or 64-bit mode with four levels of tables. */
  #fits(): boolean {
    const segments = [0, 1, 2, 3, 4, 5].map((segment) => this.base(segment));
    if (this.mode === UC.mode.real) return segments.every((base) => base % 16n === 0n && base <= 0xffff0n);
    if (this.mode === UC.mode.long) return !(this.#sregs.getBigUint64(SREGS.cr4, true) & CR4.LA57);
    return this.#sregs.getUint8(SEGMENT.db) === 1 && segments.every((base) => base === 0n);
  }

  get #efer(): bigint {
    return this.#sregs.getBigUint64(SREGS.efer, true);
  }

  get #general(): readonly number[] {
    return this.mode === UC.mode.long ? X86_64 : X86_32;
  }

  get #vectors(): number {
    return this.mode === UC.mode.long ? 16 : 8;
  }

  /** Unicorn's form of a table register: selector, base at 8, limit at 16. */
  #loadTable(engine: UnicornEngine, register: number, offset: number): void {
    const bytes = new DataView(new ArrayBuffer(24));
    bytes.setBigUint64(8, this.#sregs.getBigUint64(offset, true), true);
    bytes.setUint32(16, this.#sregs.getUint16(offset + 8, true), true);
    engine.setBytes(register, new Uint8Array(bytes.buffer));
  }

  #storeTable(engine: UnicornEngine, register: number, offset: number): void {
    const bytes = new DataView(new ArrayBuffer(24));
    engine.bytes(register, new Uint8Array(bytes.buffer));
    this.#sregs.setBigUint64(offset, bytes.getBigUint64(8, true), true);
    this.#sregs.setUint16(offset + 8, bytes.getUint32(16, true), true);
  }
}

/** Walks page tables from the level whose index starts at the first shift, down to a page or a large page. */
function walk(address: bigint, root: bigint, shifts: readonly number[], size: 4 | 8, bus: GuestBus): Translation {
  let table = root;
  for (const shift of shifts) {
    const index = (address >> BigInt(shift)) & (size === 8 ? 511n : 1023n);
    const bytes = new Uint8Array(8);
    const access = bus.read(Number(table) + size * Number(index), bytes.subarray(0, size));
    if (access.kind !== 'ok') return access;
    const entry = new DataView(bytes.buffer).getBigUint64(0, true);
    if (!(entry & PRESENT)) return null;
    table = entry & FRAME;
    if (shift > 12 && !(entry & LARGE)) continue;
    const mask = (1n << BigInt(shift)) - 1n;
    return Number((table & ~mask) | (address & mask));
  }
  return null;
}

function struct(vcpu: SoftwareVcpu, request: number, size: number): DataView {
  let bytes = vcpu.structs.get(request);
  if (!bytes) {
    bytes = new Uint8Array(size);
    vcpu.structs.set(request, bytes);
  }
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** ONE_REG ids of arm64: X0, and what follows it in struct user_pt_regs; the vectors; SCTLR_EL1. */
const ARM_X0 = 0x6030_0000_0010_0000n;
const ARM = { sp: ARM_X0 + 0x3en, pc: ARM_X0 + 0x40n, pstate: ARM_X0 + 0x42n, spEl1: ARM_X0 + 0x44n } as const;
const ARM_V0 = 0x6040_0000_0010_0054n;
const ARM_SCTLR_EL1 = 0x6030_0000_0013_c080n;
/** Unicorn's numbers: X0 to X28, then X29 and X30, and V0. */
const armGeneral = [...Array.from({ length: 29 }, (_, index) => 199 + index), 1, 2];
const [ARM64_SP, ARM64_PC, ARM64_PSTATE, ARM64_V0] = [4, 260, 265, 228] as const;
/** EL1 with its own stack pointer, everything masked: the state of a vCPU after KVM_ARM_VCPU_INIT. */
const EL1H_MASKED = 0x3c5n;

class Arm64Cpu implements UnicornCpu {
  readonly arch = UC.arm64;
  readonly mode = UC.mode.arm;
  readonly #registers: Map<bigint, Uint8Array>;

  /** Null with the MMU on. */
  static of(vcpu: SoftwareVcpu): Arm64Cpu | null {
    const cpu = new Arm64Cpu(vcpu);
    return cpu.#get(ARM_SCTLR_EL1) & 1n ? null : cpu;
  }

  constructor(vcpu: SoftwareVcpu) {
    this.#registers = vcpu.registers;
  }

  get pc(): bigint {
    return this.#get(ARM.pc);
  }

  load(engine: UnicornEngine): void {
    engine.setRegister(ARM64_PSTATE, this.#registers.has(ARM.pstate) ? this.#get(ARM.pstate) : EL1H_MASKED);
    for (const [index, number] of armGeneral.entries())
      engine.setRegister(number, this.#get(ARM_X0 + 2n * BigInt(index)));
    engine.setRegister(ARM64_SP, this.#get(this.#stack(engine)));
    for (let index = 0; index < 32; index++) {
      const vector = this.#registers.get(ARM_V0 + 4n * BigInt(index));
      if (vector) engine.setBytes(ARM64_V0 + index, vector);
    }
  }

  store(engine: UnicornEngine, pc: bigint | null): void {
    for (const [index, number] of armGeneral.entries()) this.#set(ARM_X0 + 2n * BigInt(index), engine.register(number));
    this.#set(ARM.pstate, engine.register(ARM64_PSTATE) & 0xffff_ffffn);
    this.#set(this.#stack(engine), engine.register(ARM64_SP));
    this.#set(ARM.pc, pc ?? engine.register(ARM64_PC));
    for (let index = 0; index < 32; index++) {
      const vector = new Uint8Array(16);
      engine.bytes(ARM64_V0 + index, vector);
      this.#registers.set(ARM_V0 + 4n * BigInt(index), vector);
    }
  }

  translate(address: bigint): Translation {
    return Number(address);
  }

  /** Which stack pointer is in use: bit 0 of PSTATE. */
  #stack(engine: UnicornEngine): bigint {
    return engine.register(ARM64_PSTATE) & 1n ? ARM.spEl1 : ARM.sp;
  }

  #get(id: bigint): bigint {
    const bytes = this.#registers.get(id);
    return bytes ? new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true) : 0n;
  }

  #set(id: bigint, value: bigint): void {
    const bytes = new Uint8Array(8);
    new DataView(bytes.buffer).setBigUint64(0, value, true);
    this.#registers.set(id, bytes);
  }
}
