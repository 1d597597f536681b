import type { VmFile } from '../state.ts';
import type { Access, GuestBus } from './executor.ts';
import { ProtectedPages } from './protected_pages.ts';

/** What a hypervisor that protects its guests answers itself: functions of its vendor's range. Contract §17.1. */

const FEATURES = 0x8600_0000n;
const HYP_MEMINFO = 0xc600_0002n;
export const MEM_SHARE = 0xc600_0003n;
const MEM_UNSHARE = 0xc600_0004n;
const KNOWN = 0b1_1101n;
const INVALID_PARAMETER = -3n;

/**
 * An HVC of the guest of a protected VM.
 *
 * @returns What it gets in x0; or the access that has to succeed first, and then the call is made again; null where it is not one of these.
 */
export function protectedCall(
  vm: VmFile,
  bus: GuestBus,
  number: bigint,
  args: readonly bigint[],
): bigint | Exclude<Access, { kind: 'ok' }> | null {
  if (!vm.isProtected) return null;
  const [first = 0n, second = 0n, third = 0n] = args;
  const { pageSize } = vm.machine;
  const page = first / BigInt(pageSize);
  const isPage = first % BigInt(pageSize) === 0n && first < 1n << BigInt(vm.ipaBits);
  switch (BigInt.asUintN(32, number)) {
    case FEATURES:
      return KNOWN;
    case HYP_MEMINFO:
      return (first | second | third) === 0n ? BigInt(pageSize) : INVALID_PARAMETER;
    case MEM_SHARE: {
      if ((second | third) !== 0n || !isPage) return INVALID_PARAMETER;
      const pages = ProtectedPages.of(vm);
      if (!pages.at(Number(page))) {
        const access = bus.read(Number(first), new Uint8Array(1));
        if (access.kind !== 'ok') return access;
      }
      return pages.change(Number(page), 'owned', 'shared') ? 0n : INVALID_PARAMETER;
    }
    case MEM_UNSHARE:
      if ((second | third) !== 0n || !isPage) return INVALID_PARAMETER;
      return ProtectedPages.of(vm).change(Number(page), 'shared', 'owned') ? 0n : INVALID_PARAMETER;
    default:
      return null;
  }
}
