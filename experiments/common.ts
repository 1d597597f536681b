import { Kvm, KvmError } from 'guest-memfd';
import type { ExperimentOptions } from './experiment.ts';

/** Where VMs can have private memory; by default real KVM, if it can. */
export function openWithPrivate(backend: ExperimentOptions['backend']): Kvm {
  const kvm = Kvm.open({ backend });
  if (kvm.vmTypes.has('sw-protected')) return kvm;
  kvm.close();
  if (backend === 'auto') return Kvm.open({ backend: 'software' });
  throw new KvmError({ code: 'UNSUPPORTED', message: 'the KVM of this host has no VMs with private memory' });
}

/** The same numbers for the same seed. */
export function generator(seed: number): (below: number) => number {
  let state = seed % 2147483647 || 1;
  return (below) => {
    state = (state * 48271) % 2147483647;
    return state % below;
  };
}
