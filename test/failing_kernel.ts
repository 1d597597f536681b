import { Kvm, type ModelOptions } from '../lib/index.ts';
import type { Kernel } from '../lib/kernel/kernel.ts';
import { softwareKernel } from '../lib/kernel/software/index.ts';
import { internal } from '../lib/resource.ts';
import { ERRNO } from '../lib/uapi.ts';

/** The calls of a conversion, and what they are called without the thread they are made on. */
const CALLS = /^(setMemoryAttributes2?|fallocate|madvise|cachestat|mincore)(Async)?$/;

/** A software kernel that writes down the calls that conversions make, and refuses one of them. */
export class FailingKernel {
  readonly calls: string[] = [];
  readonly kvm: Kvm;
  /** Index of the call to refuse, and of all that come after it when `forEver`. */
  failAt = -1;
  forEver = false;
  /** Where given, only these calls are counted. */
  only: string | null = null;
  errno: number = ERRNO.ENOMEM;

  constructor(model?: ModelOptions) {
    const real = softwareKernel(model);
    const kernel = new Proxy(real, {
      get: (target, name) => {
        const value = Reflect.get(target, name);
        if (typeof value !== 'function') return value;
        return (...args: unknown[]) => {
          const [, call, later] = CALLS.exec(String(name)) ?? [];
          if (!call || (this.only !== null && call !== this.only)) return value.apply(target, args);
          const index = this.calls.push(call) - 1;
          const refused = this.failAt >= 0 && (this.forEver ? index >= this.failAt : index === this.failAt);
          if (!refused) return value.apply(target, args);
          return later ? Promise.resolve(-this.errno) : -this.errno;
        };
      },
    }) as Kernel;
    this.kvm = new Kvm(internal, kernel, kernel.openKvm(), null);
  }
}
