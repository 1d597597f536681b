import { Kvm } from '../../lib/index.ts';

// The first VM of a machine, which stays to the end. With the first VM that comes and the last one that goes, Linux patches the code of its
// scheduler (a static key, for the preempt notifiers). QEMU before 8.1 may translate a page while another CPU patches it, and go on with
// what was there before: an arm64 vCPU's thread is then switched in without having been switched out, and returns from KVM_RUN with the
// guest's registers for its own.
export const vm = Kvm.open({ backend: 'kvm' }).createVm();
