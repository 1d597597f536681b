import type { VmFile } from '../state.ts';
import { type Rule, rule } from './rule.ts';

/** A vCPU, as far as KVM_RUN looks at it before the guest runs. */
export interface VcpuState {
  readonly vm: VmFile;
  readonly id: number;
  /** arm64: KVM_ARM_VCPU_INIT was called. */
  readonly initialised: boolean;
}

/** KVM_RUN. Contract §13.1; the last one is what Linux 7.3 does, of which the contract says nothing. */
export const runRules: readonly Rule<VcpuState, null>[] = [
  rule('ENOEXEC', 'vcpu-init', ({ initialised }) => !initialised && 'the vCPU needs KVM_ARM_VCPU_INIT first'),
  rule(
    'EINVAL',
    'vcpu-late',
    ({ vm, id }) =>
      vm.machine.pkvm &&
      vm.firstRun?.has(id) === false &&
      'on a host with protected KVM every vCPU has to be created before the first one of its VM runs',
  ),
];
