import { KvmError } from './errors.ts';
import type { Exit, MapGpaRangeExit, MemoryFaultExit } from './exit.ts';
import type { GuestRange, Visibility } from './guest_range.ts';
import { ERRNO } from './uapi.ts';
import { integer, options, shown, typeError } from './validate.ts';
import type { Vcpu } from './vcpu.ts';
import { Vm } from './vm.ts';

/** MAX_ERRNO: beyond it a value is no errno to the guest's kernel. */
const MAX_ERRNO = 4095;

/** What becomes of an exit: run on, or give it to the caller. */
export type Verdict = 'resume' | 'stop';

export interface ConversionPolicyOptions {
  /**
   * Whether the guest may have it. `false` refuses with EINVAL; a number, 1 to 4095, is the errno the guest reads. Everything is granted unless
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

  /** @throws TypeError `ERR_INVALID_ARG_TYPE` */
  constructor(vm: Vm, given: ConversionPolicyOptions = {}) {
    if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
    const { allow = () => true } = options('options', given);
    if (typeof allow !== 'function') throw typeError(`allow must be a function, got ${shown(allow)}`);
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
    const allow = this.#allow;
    const verdict = allow(range, to);
    // An errno of 0 would tell the guest that it has what nobody converted.
    if (verdict !== true)
      return BigInt(-(verdict === false ? ERRNO.EINVAL : integer('what allow returns', verdict, 1, MAX_ERRNO)));
    try {
      this.#vm.convertSync(range, to);
      return 0n;
    } catch (error) {
      if (!(error instanceof KvmError)) throw error;
      return BigInt(error.errno || -ERRNO.EINVAL);
    }
  }
}
