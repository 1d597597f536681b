import { Machine } from '../../lib/kernel/machine.ts';
import type { ModelOptions } from '../../lib/model_options.ts';

type Why = (machine: Machine) => string | false;

const arm: Why = ({ isArm }) => isArm && 'x86 only';
const x86: Why = ({ isArm }) => !isArm && 'arm64 only';
const pkvm: Why = (machine) => x86(machine) || (!machine.pkvm && 'needs a host in protected mode');
const proposed: Why = () => 'part of a proposed interface, which no kernel has';
const boundary: Why = () => 'the boundary itself answers, on every backend; no random program sends it';

/** Rules that no program of the fuzzer can make the deciding one on some kernels: `list rule` or `list rule index`, and why. */
const reasons: Readonly<Record<string, Why>> = {
  'createVm vm-type': arm,
  'createVm vm-type-bits': x86,
  'createVm ipa-size': (machine) => x86(machine) || (machine.pkvm && 'a protected host ignores the size'),
  'createVm protected': (machine) => x86(machine) || (machine.pkvm && 'this host is in protected mode'),
  'createGuestMemfd gmem-built': ({ hasGuestMemfd }) => hasGuestMemfd && 'this kernel has guest_memfd',
  'createGuestMemfd gmem-huge-size': proposed,
  'createGuestMemfd gmem-huge-alignment': proposed,
  'fallocate gmem-punch-split': proposed,
  'mmap guest-sealed': proposed,
  'memslot protected-flags': pkvm,
  'memslot protected-has-run': pkvm,
  'memslot ipa-limit': x86,
  'memslot gpa-limit': arm,
  'memslot gmem-needs-mmap': x86,
  'memslot gmem-binding-overlap 18': (machine) => machine.since('7.2') && 'comes later since 7.2',
  'memslot gmem-binding-overlap 24': (machine) => !machine.since('7.2') && 'comes earlier before 7.2',
  'memoryAttributes attributes-built': ({ swProtected }) => swProtected && 'this kernel has attributes',
  'enableCap exit-hypercall': arm,
  'enableCap ring-bitmap': x86,
  'mmap mmap-fixed': boundary,
  'mmap secret-private': () => 'no random program makes secret memory: test/host_memory.test.ts does',
};

const withoutAttributes: Why = ({ swProtected }) => !swProtected && 'this kernel has no attributes';
const withoutFile: Why = ({ hasGuestMemfd }) => !hasGuestMemfd && 'this kernel has no guest_memfd';

/** Why a rule cannot decide on this kernel, or null. */
export function unreachable(model: ModelOptions, list: string, rule: string, index: number): string | null {
  const machine = Machine.model(model);
  const special = (reasons[`${list} ${rule} ${index}`] ?? reasons[`${list} ${rule}`])?.(machine);
  if (special) return special;
  if (list === 'memoryAttributes' && rule !== 'attributes-built') return withoutAttributes(machine) || null;
  const aboutFiles = list === 'fallocate' || rule.startsWith('gmem-');
  return (aboutFiles && rule !== 'gmem-built' && withoutFile(machine)) || null;
}
