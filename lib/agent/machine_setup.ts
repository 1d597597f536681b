import type { Kernel } from '../kernel/kernel.ts';
import type { Arch } from '../model_options.ts';
import { supportedCpuid } from '../vcpu_setup.ts';
import { LAYOUT } from './protocol.ts';

/** What a vCPU needs before it can run the agent: every register that decides how code runs. */

const KVM_SET_MP_STATE = 0x4004ae99;

/** null, an empty 64-bit code segment, a data segment. */
export const gdt = new BigUint64Array([0n, 0x00af_9b00_0000_ffffn, 0x00cf_9300_0000_ffffn]);

/** What the setup needs of a Vcpu. */
export interface SetupVcpu {
  readonly handle: { readonly kernel: Kernel; readonly fd: number };
  setRegisters(registers: Readonly<Record<string, bigint>>): void;
}

/** As often as the agent has to start again: nothing of what the vCPU did before is left. */
export function enter(vcpu: SetupVcpu, agent: number, entry: number, tables: number): void {
  const { kernel, fd } = vcpu.handle;
  // A vCPU that is not the first waits for another one where there is an interrupt controller.
  kernel.ioctlStruct(fd, KVM_SET_MP_STATE, new Uint8Array(4));
  vcpu.setRegisters(registers[kernel.arch](BigInt(agent), BigInt(agent + LAYOUT.code + entry), BigInt(tables)));
}

const registers: Record<Arch, (agent: bigint, pc: bigint, tables: bigint) => Record<string, bigint>> = {
  /** 64-bit mode with paging, at privilege level 0; no interrupt table, so any exception is a triple fault. */
  x86_64: (agent, pc, tables) => ({
    ...segment('cs', { selector: 8n, type: 11n, l: 1n, db: 0n }),
    ...Object.assign(
      {},
      ...['ds', 'es', 'fs', 'gs', 'ss'].map((name) => segment(name, { selector: 16n, type: 3n, l: 0n, db: 1n })),
    ),
    'gdt.base': agent + BigInt(LAYOUT.descriptors),
    'gdt.limit': BigInt(gdt.byteLength - 1),
    'idt.base': 0n,
    'idt.limit': 0n,
    // PE, ET, NE, PG
    cr0: 0x8000_0031n,
    cr3: tables,
    // PAE
    cr4: 0x20n,
    // LME, LMA
    efer: 0x500n,
    rip: pc,
    rflags: 2n,
    rsp: agent + BigInt(LAYOUT.stack),
  }),
  /** EL1 with its own stack pointer, MMU and caches on, 48-bit addresses in 4 KiB granules through TTBR0 only; no interrupts. */
  aarch64: (agent, pc, tables) => ({
    // D, A, I, F, EL1h
    pstate: 0x3c5n,
    pc,
    sp_el1: agent + BigInt(LAYOUT.stack),
    mair_el1: 0xffn,
    // T0SZ 16; walks inner shareable, write-back; EPD1; IPS: more than the CPU has means what it has
    tcr_el1: 16n | (1n << 8n) | (1n << 10n) | (3n << 12n) | (16n << 16n) | (1n << 23n) | (5n << 32n),
    ttbr0_el1: tables,
    vbar_el1: agent + BigInt(LAYOUT.code),
    // M, C, I, and the bits that read as one without later extensions
    sctlr_el1: 0x30d0_1805n,
  }),
};

function segment(
  name: string,
  { selector, type, l, db }: { selector: bigint; type: bigint; l: bigint; db: bigint },
): Record<string, bigint> {
  const fields = { base: 0n, limit: 0xffff_ffffn, selector, type, present: 1n, dpl: 0n, db, s: 1n, l, g: 1n };
  return Object.fromEntries(
    Object.entries({ ...fields, avl: 0n, unusable: 0n }).map(([field, value]) => [`${name}.${field}`, value]),
  );
}

/** Whether the hypercall instruction is VMMCALL: AMD's, and Hygon's. The other one would be an exception, or patched into it. */
export function usesVmmcall(kernel: Kernel): boolean {
  const table = kernel.arch === 'x86_64' && supportedCpuid(kernel);
  if (!table) return false;
  const view = new DataView(table.buffer);
  const vendors = Array.from({ length: view.getUint32(0, true) }, (_, index) => 8 + 40 * index)
    .filter((entry) => view.getUint32(entry, true) === 0)
    // ebx, edx, ecx of leaf 0 spell the name.
    .map((entry) =>
      String.fromCharCode(...[16, 24, 20].flatMap((at) => [...table.subarray(entry + at, entry + at + 4)])),
    );
  return vendors.some((vendor) => vendor === 'AuthenticAMD' || vendor === 'HygonGenuine');
}
