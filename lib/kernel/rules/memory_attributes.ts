import { formatRange, hex } from '../../format.ts';
import { hasOtherBits, isAligned, isZero, wraps } from '../arguments.ts';
import type { U64 } from '../kernel.ts';
import { supportedAttributes } from '../machine.ts';
import type { VmFile } from '../state.ts';
import { type Rule, rule } from './rule.ts';

export interface AttributesRequest {
  readonly address: U64;
  readonly size: U64;
  readonly attributes: U64;
  readonly flags: U64;
}

/** KVM_SET_MEMORY_ATTRIBUTES. Contract §12. */
export const memoryAttributesRules: readonly Rule<VmFile, AttributesRequest>[] = [
  rule(
    ({ machine }) => (machine.isArm ? 'EINVAL' : 'ENOTTY'),
    'attributes-built',
    ({ machine }) =>
      !machine.swProtected && 'this kernel has no memory attributes (CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES)',
  ),
  rule('EINVAL', 'attributes-flags', (_vm, { flags }) => !isZero(flags) && `flags are ${hex(flags)}, not 0`),
  rule('EINVAL', 'attributes-supported', (vm, { attributes }) => {
    if (!hasOtherBits(attributes, supportedAttributes(vm.machine, vm))) return false;
    return vm.hasPrivate
      ? `attributes ${hex(attributes)} are not 0 or 8 (private)`
      : 'this VM type has no private memory';
  }),
  rule('EINVAL', 'attributes-range', (_vm, { address, size }) => {
    return (
      (isZero(size) || wraps(address, size)) &&
      `range ${formatRange(address, size)} is empty or reaches the end of the address space`
    );
  }),
  rule('EINVAL', 'attributes-alignment', ({ machine }, { address, size }) => {
    const aligned = isAligned(address, machine.pageSize) && isAligned(size, machine.pageSize);
    return !aligned && `range ${formatRange(address, size)} is not made of whole pages of ${machine.pageSize} bytes`;
  }),
];
