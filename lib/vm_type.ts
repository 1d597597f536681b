import {
  KVM_VM_TYPE_ARM_PROTECTED,
  KVM_X86_DEFAULT_VM,
  KVM_X86_SEV_ES_VM,
  KVM_X86_SEV_VM,
  KVM_X86_SNP_VM,
  KVM_X86_SW_PROTECTED_VM,
  KVM_X86_TDX_VM,
} from './uapi.ts';

/** 'protected' is arm64's pKVM; the others but 'default' are x86_64's. */
export type VmType = 'default' | 'sw-protected' | 'sev' | 'sev-es' | 'snp' | 'tdx' | 'protected';

export const x86VmTypes: ReadonlyMap<VmType, number> = new Map<VmType, number>([
  ['default', KVM_X86_DEFAULT_VM],
  ['sw-protected', KVM_X86_SW_PROTECTED_VM],
  ['sev', KVM_X86_SEV_VM],
  ['sev-es', KVM_X86_SEV_ES_VM],
  ['snp', KVM_X86_SNP_VM],
  ['tdx', KVM_X86_TDX_VM],
]);

export const armVmTypes: ReadonlyMap<VmType, number> = new Map<VmType, number>([
  ['default', 0],
  ['protected', KVM_VM_TYPE_ARM_PROTECTED],
]);

export const vmTypeNames: readonly VmType[] = [...x86VmTypes.keys(), 'protected'];

/** What a VM type needs, for the message that says it is not there. */
export const vmTypeNeeds: Readonly<Record<VmType, string>> = {
  default: 'any KVM',
  'sw-protected': 'x86_64, CONFIG_KVM_SW_PROTECTED_VM and hardware paging (kvm_intel.ept, kvm_amd.npt), Linux 6.8',
  sev: 'an AMD processor with SEV, and kvm_amd.sev=1',
  'sev-es': 'an AMD processor with SEV-ES, and kvm_amd.sev_es=1',
  snp: 'an AMD processor with SEV-SNP, and kvm_amd.sev_snp=1',
  tdx: 'an Intel processor with TDX, and kvm_intel.tdx=1',
  protected: 'arm64 booted with kvm-arm.mode=protected, Linux 7.1',
};
