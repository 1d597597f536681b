import type { SoftwareVcpu } from './vcpu.ts';

/** What an access by guest code came to. Contract §13.3. */
export type Access =
  /** Done. */
  | { readonly kind: 'ok' }
  /** No memory there, or a write to a read-only slot: the host is asked, by an exit. */
  | { readonly kind: 'mmio'; readonly gpa: number }
  /** KVM_RUN fails with this errno; `fault` says whether kvm_run tells why. */
  | {
      readonly kind: 'fault';
      readonly errno: number;
      readonly fault: { readonly gpa: number; readonly private: boolean } | null;
    };

/** The guest's physical memory as its CPU reaches it: slot, attribute and file decide, page by page. */
export interface GuestBus {
  /** Reads up to the first page that does not answer 'ok'; `done` bytes were read. */
  read(gpa: number, target: Uint8Array): Access & { readonly done: number };
  write(gpa: number, source: Uint8Array): Access & { readonly done: number };
}

/**
 * Why guest code stopped. Everything but 'deadline' is an exit that the vCPU writes into kvm_run; the executor is called again after the host
 * has answered, with the answer in kvm_run, and goes on from there.
 */
export type Stop =
  | {
      readonly kind: 'io';
      readonly direction: 'in' | 'out';
      readonly port: number;
      readonly size: 1 | 2 | 4;
      readonly data: Uint8Array;
    }
  | { readonly kind: 'mmio'; readonly gpa: number; readonly isWrite: boolean; readonly data: Uint8Array }
  | {
      readonly kind: 'hypercall';
      readonly number: bigint;
      readonly args: readonly bigint[];
      readonly longMode: boolean;
    }
  | {
      readonly kind: 'fault';
      readonly errno: number;
      readonly fault: { readonly gpa: number; readonly private: boolean } | null;
    }
  | { readonly kind: 'hlt' }
  | { readonly kind: 'shutdown' }
  | { readonly kind: 'system-event'; readonly type: number }
  | { readonly kind: 'internal-error'; readonly suberror: number }
  | { readonly kind: 'deadline' };

/** Carries out guest code. */
export interface Executor {
  /**
   * Runs from the vCPU's program counter until something stops it. `expired` is asked between pieces of work.
   *
   * @param answer What the host left in kvm_run for the last stop: the bytes of an 'in' or of an MMIO read, or the hypercall's return value.
   */
  run(vcpu: SoftwareVcpu, bus: GuestBus, answer: Uint8Array | bigint | null, expired: () => boolean): Stop;
}

/** Knows whether the code a vCPU is about to run is code it can carry out. */
export interface ExecutorFactory {
  /** An executor for this vCPU, null when the code at its program counter is not for it. */
  open(vcpu: SoftwareVcpu, bus: GuestBus): Executor | null;
  /** What would let it take other code: a command, or a state to be in. */
  readonly advice?: string;
}
