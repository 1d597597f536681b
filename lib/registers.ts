import type { Kernel, Result } from './kernel/kernel.ts';
import { KVM_GET_REGS, KVM_GET_SREGS, KVM_REGS, KVM_SET_REGS, KVM_SET_SREGS } from './uapi.ts';
import { rangeError, typeError } from './validate.ts';

/** The registers of a vCPU by name, over whatever calls its architecture has for them. */
export interface RegisterFile {
  get(): Record<string, bigint>;
  set(registers: Readonly<Record<string, bigint>>): void;
}

interface Field {
  readonly offset: number;
  readonly bytes: 1 | 2 | 4 | 8;
}

const KVM_REG_ARM64_U64 = 0x6030_0000_0000_0000n;
const ARM_CORE = 0x0010_0000n;
const ARM_SYSTEM = 0x0013_0000n;

const segments = ['cs', 'ds', 'es', 'fs', 'gs', 'ss', 'tr', 'ldt'];
const segmentFields: readonly (readonly [string, Field])[] = [
  ['base', { offset: 0, bytes: 8 }],
  ['limit', { offset: 8, bytes: 4 }],
  ['selector', { offset: 12, bytes: 2 }],
  ['type', { offset: 14, bytes: 1 }],
  ['present', { offset: 15, bytes: 1 }],
  ['dpl', { offset: 16, bytes: 1 }],
  ['db', { offset: 17, bytes: 1 }],
  ['s', { offset: 18, bytes: 1 }],
  ['l', { offset: 19, bytes: 1 }],
  ['g', { offset: 20, bytes: 1 }],
  ['avl', { offset: 21, bytes: 1 }],
  ['unusable', { offset: 22, bytes: 1 }],
];

/** struct kvm_regs. */
const x86General = new Map<string, Field>(KVM_REGS.map((name, index) => [name, { offset: 8 * index, bytes: 8 }]));
/** struct kvm_sregs, without the interrupt bitmap. */
const x86Special = new Map<string, Field>([
  ...segments.flatMap((name, index) =>
    segmentFields.map(([field, { offset, bytes }]): [string, Field] => [
      `${name}.${field}`,
      { offset: 24 * index + offset, bytes },
    ]),
  ),
  ['gdt.base', { offset: 192, bytes: 8 }],
  ['gdt.limit', { offset: 200, bytes: 2 }],
  ['idt.base', { offset: 208, bytes: 8 }],
  ['idt.limit', { offset: 216, bytes: 2 }],
  ...['cr0', 'cr2', 'cr3', 'cr4', 'cr8', 'efer', 'apic_base'].map((name, index): [string, Field] => [
    name,
    { offset: 224 + 8 * index, bytes: 8 },
  ]),
]);

const systemRegister = (op0: number, op1: number, crn: number, crm: number, op2: number): bigint =>
  KVM_REG_ARM64_U64 | ARM_SYSTEM | BigInt((op0 << 14) | (op1 << 11) | (crn << 7) | (crm << 3) | op2);
const core = (offset: number): bigint => KVM_REG_ARM64_U64 | ARM_CORE | BigInt(offset / 4);

/** ONE_REG ids: the core registers by their offset in struct kvm_regs, and the system registers that set up EL1. */
const armRegisters = new Map<string, bigint>([
  ...Array.from({ length: 31 }, (_, index): [string, bigint] => [`x${index}`, core(8 * index)]),
  ['sp', core(248)],
  ['pc', core(256)],
  ['pstate', core(264)],
  ['sp_el1', core(272)],
  ['elr_el1', core(280)],
  ['sctlr_el1', systemRegister(3, 0, 1, 0, 0)],
  ['cpacr_el1', systemRegister(3, 0, 1, 0, 2)],
  ['ttbr0_el1', systemRegister(3, 0, 2, 0, 0)],
  ['ttbr1_el1', systemRegister(3, 0, 2, 0, 1)],
  ['tcr_el1', systemRegister(3, 0, 2, 0, 2)],
  ['mair_el1', systemRegister(3, 0, 10, 2, 0)],
  ['vbar_el1', systemRegister(3, 0, 12, 0, 0)],
]);

/** What a vCPU has of them at least, where KVM_GET_REG_LIST cannot be asked. */
export const armRegisterIds: readonly bigint[] = [...armRegisters.values()];

export function registerFile(
  kernel: Kernel,
  vcpu: number,
  check: (result: Result, request: string) => number,
): RegisterFile {
  return kernel.arch === 'aarch64' ? new ArmRegisters(kernel, vcpu, check) : new X86Registers(kernel, vcpu, check);
}

type Check = (result: Result, request: string) => number;

/** Names and values are checked before anything is written. */
function checked(registers: Readonly<Record<string, bigint>>, known: (name: string) => boolean): [string, bigint][] {
  if (typeof registers !== 'object' || registers === null) throw typeError('registers must be an object');
  const entries = Object.entries(registers);
  for (const [name, value] of entries) {
    if (!known(name)) throw rangeError(`there is no register ${JSON.stringify(name)} on this architecture`);
    if (typeof value !== 'bigint') throw typeError(`register ${name} must be a bigint`);
    if (value < -(1n << 63n) || value >= 1n << 64n) throw rangeError(`register ${name} has 64 bits`);
  }
  return entries;
}

class X86Registers implements RegisterFile {
  readonly #kernel: Kernel;
  readonly #vcpu: number;
  readonly #check: Check;

  constructor(kernel: Kernel, vcpu: number, check: Check) {
    this.#kernel = kernel;
    this.#vcpu = vcpu;
    this.#check = check;
  }

  get(): Record<string, bigint> {
    return {
      ...read(this.#struct(KVM_GET_REGS, 144), x86General),
      ...read(this.#struct(KVM_GET_SREGS, 312), x86Special),
    };
  }

  set(registers: Readonly<Record<string, bigint>>): void {
    const entries = checked(registers, (name) => x86General.has(name) || x86Special.has(name));
    this.#write(entries, x86Special, KVM_GET_SREGS, KVM_SET_SREGS, 312, 'KVM_SET_SREGS');
    this.#write(entries, x86General, KVM_GET_REGS, KVM_SET_REGS, 144, 'KVM_SET_REGS');
  }

  #write(
    entries: readonly [string, bigint][],
    fields: ReadonlyMap<string, Field>,
    get: number,
    set: number,
    size: number,
    name: string,
  ): void {
    const mine = entries.filter(([register]) => fields.has(register));
    if (mine.length === 0) return;
    const struct = this.#struct(get, size);
    const view = new DataView(struct.buffer);
    for (const [register, value] of mine) {
      const { offset, bytes } = fields.get(register) as Field;
      if (bytes === 8) view.setBigUint64(offset, BigInt.asUintN(64, value), true);
      else if (bytes === 4) view.setUint32(offset, Number(BigInt.asUintN(32, value)), true);
      else if (bytes === 2) view.setUint16(offset, Number(BigInt.asUintN(16, value)), true);
      else view.setUint8(offset, Number(BigInt.asUintN(8, value)));
    }
    this.#check(this.#kernel.ioctlStruct(this.#vcpu, set, struct), name);
  }

  #struct(request: number, size: number): Uint8Array {
    const struct = new Uint8Array(size);
    this.#check(
      this.#kernel.ioctlStruct(this.#vcpu, request, struct),
      request === KVM_GET_REGS ? 'KVM_GET_REGS' : 'KVM_GET_SREGS',
    );
    return struct;
  }
}

function read(struct: Uint8Array, fields: ReadonlyMap<string, Field>): Record<string, bigint> {
  const view = new DataView(struct.buffer);
  return Object.fromEntries(
    Array.from(fields, ([name, { offset, bytes }]) => {
      if (bytes === 8) return [name, view.getBigUint64(offset, true)];
      if (bytes === 4) return [name, BigInt(view.getUint32(offset, true))];
      return [name, BigInt(bytes === 2 ? view.getUint16(offset, true) : view.getUint8(offset))];
    }),
  );
}

class ArmRegisters implements RegisterFile {
  readonly #kernel: Kernel;
  readonly #vcpu: number;
  readonly #check: Check;

  constructor(kernel: Kernel, vcpu: number, check: Check) {
    this.#kernel = kernel;
    this.#vcpu = vcpu;
    this.#check = check;
  }

  get(): Record<string, bigint> {
    const value = new BigUint64Array(1);
    const bytes = new Uint8Array(value.buffer);
    return Object.fromEntries(
      Array.from(armRegisters, ([name, id]) => {
        this.#check(this.#kernel.getOneReg(this.#vcpu, id, bytes), 'KVM_GET_ONE_REG');
        return [name, value[0] as bigint];
      }),
    );
  }

  set(registers: Readonly<Record<string, bigint>>): void {
    const value = new BigUint64Array(1);
    const bytes = new Uint8Array(value.buffer);
    for (const [name, wanted] of checked(registers, (register) => armRegisters.has(register))) {
      value[0] = BigInt.asUintN(64, wanted);
      this.#check(this.#kernel.setOneReg(this.#vcpu, armRegisters.get(name) as bigint, bytes), 'KVM_SET_ONE_REG');
    }
  }
}
