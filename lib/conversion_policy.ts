import { KvmError } from './errors.ts';
import type { Exit, MapGpaRangeExit, MemoryFaultExit } from './exit.ts';
import type { GuestRange, Visibility } from './guest_range.ts';
import { ERRNO } from './uapi.ts';
import type { Vcpu } from './vcpu.ts';
import type { Vm } from './vm.ts';

/** What becomes of an exit: run on, or give it to the caller. */
export type Verdict = 'resume' | 'stop';

export interface ConversionPolicyOptions {
  /**
   * Whether the guest may have it. `false` refuses with EINVAL; a number is the errno the guest reads, positive. Everything is granted unless
   * given.
   */
  readonly allow?: (range: GuestRange, to: Visibility) => boolean | number;
}

/**
 * Answers a guest that wants memory converted: the guest asks (MAP_GPA_RANGE), or simply touches a page the other way, which is a memory
 * fault; the policy converts or refuses, and the guest reads the answer and goes on. Give `handle` to GuestAgent as `onExit`, or drive a
 * vCPU with `run`.
 */
export class ConversionPolicy {
  readonly #vm: Vm;
  readonly #allow: (range: GuestRange, to: Visibility) => boolean | number;

  constructor(vm: Vm, { allow = () => true }: ConversionPolicyOptions = {}) {
    this.#vm = vm;
    this.#allow = allow;
  }

  /** 'resume' when the guest has its answer; 'stop' for exits that are not about conversion, and for faults that no conversion repairs. */
  readonly handle = (exit: Exit): Verdict => {
    if (exit.reason === 'map-gpa-range') return this.#request(exit);
    return exit.reason === 'memory-fault' ? this.#fault(exit) : 'stop';
  };

  /** Runs until an exit that is not about conversion. `timeout` is for each run. */
  run(vcpu: Vcpu, options: { readonly timeout?: number } = {}): Exit {
    for (;;) {
      const exit = vcpu.run(options);
      if (this.handle(exit) === 'stop') return exit;
    }
  }

  #request(exit: MapGpaRangeExit): Verdict {
    const { address, size, to } = exit;
    const aligned = address % this.#vm.kvm.pageSize === 0 && size % this.#vm.kvm.pageSize === 0;
    const possible = aligned && size > 0 && Number.isSafeInteger(address + size);
    exit.reply(possible ? this.#convert({ address, size }, to) : BigInt(-ERRNO.EINVAL));
    return 'resume';
  }

  /** The access says which side the guest means. Where attribute and access agree already, the page is missing for another reason. */
  #fault({ address, size, visibility, repeats }: MemoryFaultExit): Verdict {
    if (repeats > 1 || this.#vm.attributes.at(address) === visibility) return 'stop';
    return this.#convert({ address, size }, visibility) === 0n ? 'resume' : 'stop';
  }

  /** @returns what the guest reads: 0, or a negative errno. */
  #convert(range: GuestRange, to: Visibility): bigint {
    const verdict = this.#allow(range, to);
    if (verdict !== true) return BigInt(-(verdict === false ? ERRNO.EINVAL : verdict));
    try {
      this.#vm.convertSync(range, to);
      return 0n;
    } catch (error) {
      if (!(error instanceof KvmError)) throw error;
      return BigInt(error.errno || -ERRNO.EINVAL);
    }
  }
}
