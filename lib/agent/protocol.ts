import type { Arch } from '../model_options.ts';
import { KiB } from '../uapi.ts';
import { code_aarch64 } from './code_aarch64.ts';
import { code_x86_64 } from './code_x86_64.ts';

/** How host and guest code talk: what native/guest/*.S assumes, in the same words. */

export interface AgentCode {
  readonly base64: string;
  /** Where to enter: rings the doorbell, then waits for a command. */
  readonly start: number;
  /** Behind the doorbell: reads the command in the mailbox. */
  readonly resume: number;
}

/** The agent's memory, in bytes from its start. */
export const AGENT_SIZE = 128 * KiB;
export const LAYOUT = {
  mailbox: 0,
  code: 4 * KiB,
  /** x86: the GDT; the agent needs no stack, and has the rest of the page for one. */
  descriptors: 8 * KiB,
  stack: 12 * KiB,
  tables: 12 * KiB,
  buffer: 64 * KiB,
} as const;
export const TABLE_PAGES = (LAYOUT.buffer - LAYOUT.tables) / (4 * KiB);
/** The buffer's byte for an address is the one at the same place of its 64 KiB, so that both are aligned alike. */
export const BUFFER_SIZE = 64 * KiB;

/** Words of the mailbox: 64 bits, little-endian, in bytes from its start. */
export const MAILBOX = {
  /** Set by the host; 0 when it is done. */
  command: 0x00,
  address: 0x08,
  size: 0x10,
  /** Up to five. */
  args: 0x18,
  result: 0x40,
  /** The root of the page tables, loaded before each command, because the host may have changed them. */
  tables: 0x48,
  /** x86: 0 for VMCALL, 1 for VMMCALL. */
  vmmcall: 0x50,
  /** arm64: where to ring, an address that has no memory. */
  doorbell: 0x58,
  /** arm64: bytes of a page, for an agent that has to share its memory with the host, as a guest of a protected VM has to; 0 otherwise. */
  share: 0x60,
  end: 0x68,
} as const;

export const COMMAND = {
  none: 0,
  /** [address, +size) → buffer. */
  read: 1,
  /** buffer → [address, +size). */
  write: 2,
  /** args: the byte, eight times. */
  fill: 3,
  /** args: the checksum so far. */
  checksum: 4,
  /** args: expected, replacement. result: what was there. */
  compareAndSwap: 5,
  /** args: bytes of a page, whether to write the byte back. */
  touch: 6,
  /** args: number, and four more. */
  hypercall: 7,
  halt: 8,
  /** Rings for a conversion: address, size, and 1 in args for private. The host leaves the answer in result. */
  ask: 9,
} as const;

/** What the agent says with its doorbell: a 4-byte `out` to this port (x86), a 4-byte store to the doorbell's address (arm64). */
export const PORT = 0x4d46;
export const DOORBELL = {
  /** The last command is done. */
  ready: 0,
  ask: 1,
  /** arm64: an exception ended the command. result: ESR_EL1, the first of args: FAR_EL1. */
  exception: 2,
} as const;

/** Bits of address that the agent's page tables reach. */
export const ADDRESS_BITS = { x86_64: 46, aarch64: 48 } as const;

const codes = { x86_64: code_x86_64, aarch64: code_aarch64 } as const;

export function agentCode(arch: Arch): { readonly bytes: Uint8Array; readonly start: number; readonly resume: number } {
  const { base64, start, resume } = codes[arch];
  return { bytes: Uint8Array.from(Buffer.from(base64, 'base64')), start, resume };
}
