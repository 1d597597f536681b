import { KVM_CAP } from '../../lib/uapi.ts';

/** What KVM_CHECK_EXTENSION is asked. */
export const capsAsked: readonly number[] = Object.entries(KVM_CAP)
  .filter(([name]) => !['ARM_VM_IPA_SIZE'].includes(name))
  .map(([, number]) => number);

/** What KVM_ENABLE_CAP is asked: no other capability is sent, some of which change how a VM runs. */
export const capsEnabled: readonly number[] = [
  KVM_CAP.MANUAL_DIRTY_LOG_PROTECT2,
  KVM_CAP.MANUAL_DIRTY_LOG_PROTECT2,
  KVM_CAP.EXIT_HYPERCALL,
  KVM_CAP.DIRTY_LOG_RING,
  KVM_CAP.DIRTY_LOG_RING_ACQ_REL,
  KVM_CAP.DIRTY_LOG_RING_WITH_BITMAP,
  KVM_CAP.DIRTY_LOG_RING_WITH_BITMAP,
  KVM_CAP.GUEST_MEMFD,
  0xffff_ffff,
];
