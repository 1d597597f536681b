import { hex } from '../../format.ts';
import { hasOtherBits } from '../arguments.ts';
import type { U64 } from '../kernel.ts';
import { GuestMemfdFile, type OpenFile, type VmFile } from '../state.ts';
import { type Rule, rule } from './rule.ts';

export interface LinkRequest {
  readonly flags: U64;
  /** What the fd number stands for in the calling process. */
  readonly file: OpenFile | undefined;
}

/** KVM_LINK_GUEST_MEMFD, as it is proposed: a file of one VM as a file of another, with the same pages. */
export const linkRules: readonly Rule<VmFile, LinkRequest>[] = [
  rule(
    ({ machine }) => (machine.isArm ? 'EINVAL' : 'ENOTTY'),
    'link-built',
    ({ machine }) =>
      !machine.proposals.has('link') && "this kernel has no KVM_LINK_GUEST_MEMFD, which is only proposed ('link')",
  ),
  rule('EINVAL', 'link-flags', (_vm, { flags }) => hasOtherBits(flags, 0) && `flags ${hex(flags)} are not 0`),
  rule('EBADF', 'link-fd', (_vm, { file }) => !file && 'the fd is not open'),
  rule('EINVAL', 'link-file', (_vm, { file }) => !(file instanceof GuestMemfdFile) && 'the file is not a guest_memfd'),
  rule('EINVAL', 'link-own', (vm, { file }) => (file as GuestMemfdFile).vm === vm && 'the file is this VM’s already'),
  rule('EINVAL', 'link-type', (vm, { file }) => {
    const { vm: other } = file as GuestMemfdFile;
    return (
      (other.hasPrivate !== vm.hasPrivate || other.isProtected !== vm.isProtected) &&
      'the VMs are not of one type: what is private in one has no meaning in the other'
    );
  }),
];
