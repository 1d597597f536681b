import { Kvm, KvmError, type Vm, type VmCapabilities, type VmType } from '../index.ts';
import { armVmTypes, vmTypeNames, vmTypeNeeds, x86VmTypes } from '../vm_type.ts';
import type { Common } from './options.ts';
import { amount, type Paint, wrap } from './text.ts';

type Value = boolean | number | string;
type Answers = Readonly<Record<string, { readonly value: Value; readonly evidence: string }>>;

/** What probe finds; the shape of its JSON. */
export interface Findings {
  readonly version: string;
  readonly node: string;
  readonly backend: Kvm['backend'];
  /** Why it is the software kernel although KVM was tried. */
  readonly fallbackReason: { readonly code: string; readonly message: string } | null;
  readonly kernel: string;
  readonly arch: Kvm['arch'];
  /** Bytes. */
  readonly pageSize: number;
  readonly apiVersion: number;
  readonly vmTypes: {
    readonly creatable: readonly VmType[];
    /** Of this architecture, and what they need. */
    readonly missing: Readonly<Partial<Record<VmType, string>>>;
  };
  /** VM types whose memory can be converted. */
  readonly privateMemory: readonly VmType[];
  /** By VM type; null where no VM was created, and `notAsked` says why. Bit masks are hexadecimal strings. */
  readonly capabilities: Readonly<Partial<Record<VmType, Answers | null>>>;
  readonly notAsked: Readonly<Partial<Record<VmType, string>>>;
}

export function probe({ open }: Common, version: string): Findings {
  using kvm = Kvm.open(open);
  const { backend, fallbackReason, arch, pageSize, apiVersion } = kvm;
  const known = arch === 'aarch64' ? armVmTypes : x86VmTypes;
  const creatable = [...kvm.vmTypes];
  const missing = vmTypeNames.filter((type) => known.has(type) && !kvm.vmTypes.has(type));
  const capabilities: Partial<Record<VmType, Answers | null>> = {};
  const notAsked: Partial<Record<VmType, string>> = {};
  const privateMemory: VmType[] = [];
  for (const type of creatable) {
    const asked = ask(kvm, type);
    if (typeof asked === 'string') notAsked[type] = asked;
    capabilities[type] = typeof asked === 'string' ? null : answers(asked);
    if (typeof asked !== 'string' && asked.conversion !== 'none') privateMemory.push(type);
  }
  return {
    version,
    node: process.versions.node,
    backend,
    fallbackReason: fallbackReason && { code: fallbackReason.code, message: fallbackReason.message },
    kernel: kvm.kernelRelease,
    arch,
    pageSize,
    apiVersion,
    vmTypes: { creatable, missing: Object.fromEntries(missing.map((type) => [type, vmTypeNeeds[type]])) },
    privateMemory,
    capabilities,
    notAsked,
  };
}

/** The capabilities of a VM of the type, or why there is none to ask. */
function ask(kvm: Kvm, type: VmType): VmCapabilities | string {
  if (type === 'protected' && kvm.backend === 'kvm') return 'creating one would taint the host’s kernel';
  try {
    using vm: Vm = kvm.createVm({ type });
    return vm.capabilities;
  } catch (error) {
    if (error instanceof KvmError) return error.message;
    throw error;
  }
}

function answers({ evidence, ...values }: VmCapabilities): Answers {
  return Object.fromEntries(
    Object.entries(values).map(([name, value]) => [
      name,
      { value: typeof value === 'bigint' ? `0x${value.toString(16)}` : value, evidence: evidence[name] ?? 'unknown' },
    ]),
  );
}

// ── Drawing

const NAME = 22;
const VALUE = 14;
/** As many columns of values as fit. */
const TYPES_ABREAST = 3;

export function drawFindings(findings: Findings, paint: Paint): string[] {
  const { version, node, backend, fallbackReason, kernel, arch, pageSize, apiVersion, vmTypes, privateMemory } =
    findings;
  const field = (name: string, text: string): string[] => wrap(text, ' '.repeat(18), `  ${name.padEnd(16)}`);
  return [
    ...field('guest-memfd', `${version} on Node.js ${node}`),
    ...field('backend', backend === 'kvm' ? 'KVM of this host' : 'software kernel: a model of KVM in this process'),
    ...(fallbackReason ? field('', `because ${fallbackReason.message}`).map((line) => paint('yellow', line)) : []),
    ...field('kernel', `${backend === 'kvm' ? '' : 'plays '}Linux ${kernel}, KVM API ${apiVersion}`),
    ...field('machine', `${arch}, pages of ${amount(pageSize)}`),
    ...field('private memory', verdict(findings)).map((line) =>
      paint(privateMemory.length > 0 ? 'green' : 'yellow', line),
    ),
    '',
    paint('bold', 'VM types'),
    ...vmTypes.creatable.map((type) => `  ${paint('green', '✓')} ${type}`),
    ...Object.entries(vmTypes.missing).flatMap(([type, needs]) =>
      wrap(`needs ${needs}`, ' '.repeat(19), `  ✗ ${type.padEnd(15)}`).map((line) => paint('dim', line)),
    ),
    '',
    ...drawCapabilities(findings, paint),
  ];
}

function verdict({ backend, privateMemory }: Findings): string {
  if (privateMemory.length > 0) return `yes: VMs of type ${privateMemory.join(', ')}`;
  return backend === 'kvm'
    ? 'not here: no VM type of this KVM has it (see below). To try it: guest-memfd demo --backend software'
    : 'not on the kernel it plays; the newest on x86_64 has it';
}

function drawCapabilities({ backend, capabilities, notAsked }: Findings, paint: Paint): string[] {
  const tables = Object.entries(capabilities).flatMap(([type, found]) => (found ? [{ type, found }] : []));
  const lines: string[] = [];
  for (let at = 0; at < tables.length; at += TYPES_ABREAST) {
    const abreast = tables.slice(at, at + TYPES_ABREAST);
    const heads = abreast.map(({ type }) => type.padEnd(VALUE)).join('');
    lines.push(paint('bold', `${'Capabilities of a VM'.padEnd(NAME + 2)}${heads}evidence`));
    for (const name of Object.keys(abreast[0]?.found ?? {})) {
      const cells = abreast.map(({ found }) => drawValue(found[name]?.value, paint)).join('');
      const evidence = [...new Set(abreast.map(({ found }) => found[name]?.evidence))].join(', ');
      lines.push(`  ${name.padEnd(NAME)}${cells}${paint('dim', evidence)}`);
    }
  }
  for (const [type, why] of Object.entries(notAsked))
    lines.push(...wrap(`VMs of type ${type} were not asked: ${why}`, '  '));
  const how = backend === 'kvm' ? 'the kernel says so' : 'the software kernel plays it';
  return [
    ...lines,
    paint('dim', `  Names as in vm.capabilities; ${backend === 'kvm' ? 'reported' : 'modelled'}: ${how}.`),
  ];
}

function drawValue(value: Value | undefined, paint: Paint): string {
  if (value === true) return paint('green', 'yes'.padEnd(VALUE));
  if (value === false || value === 'none' || value === '0x0')
    return paint('dim', (value === false ? 'no' : `${value}`).padEnd(VALUE));
  return `${value}`.padEnd(VALUE);
}
