import { low32 } from '../arguments.ts';
import type { Result } from '../kernel.ts';
import { grantRingRules } from '../rules/grant_ring.ts';
import type { EnableCapRequest } from '../rules/vm.ts';
import type { VmFile } from '../state.ts';
import type { GuestBus } from './executor.ts';
import { type GrantCounts, GrantRing } from './grant_ring.ts';
import { GuestSealCalls } from './guest_seal_calls.ts';

/** The proposed ring of grants: enabled by a capability, looked at on every exit. */
export abstract class GrantCalls extends GuestSealCalls {
  readonly #rings = new WeakMap<VmFile, GrantRing>();

  /** What came of a guest's grants so far; EINVAL for a VM without a ring. */
  grantCounts(vm: number): Readonly<GrantCounts> | Result {
    const owner = this.vm(vm);
    if (typeof owner === 'number') return owner;
    const ring = this.#rings.get(owner);
    return ring ? { ...ring.counts } : this.refuse('EINVAL', 'the VM has no ring of grants');
  }

  protected enableGrantRing(vm: VmFile, request: EnableCapRequest): Result {
    const refused = this.check(grantRingRules, { vm, hasRing: this.#rings.has(vm) }, request);
    if (refused !== null) return refused;
    this.#rings.set(vm, new GrantRing(vm, Number(request.args[0]), low32(request.args[1])));
    return 0;
  }

  protected override exited(vm: VmFile, bus: GuestBus): void {
    this.#rings.get(vm)?.collect(bus);
  }
}
