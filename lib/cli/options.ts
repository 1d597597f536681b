import { parseArgs } from 'node:util';
import type { BackendName, KernelVersion, OpenOptions } from '../index.ts';
import { type Arch, kernelVersions } from '../model_options.ts';
import { GiB, KiB, MiB, TiB } from '../uapi.ts';
import { type VmType, vmTypeNames } from '../vm_type.ts';

/** What the user typed cannot be: one line, and where help is. */
export class UsageError extends Error {
  override readonly name = 'UsageError';
  readonly topic: Topic | undefined;

  constructor(message: string, topic?: Topic) {
    super(message);
    this.topic = topic;
  }
}

export type Topic = 'probe' | 'demo';

export interface Common {
  /** For Kvm.open(). */
  readonly open: OpenOptions;
  readonly json: boolean;
}

export interface DemoOptions extends Common {
  /** The VM type asked for; the best there is when undefined. */
  readonly type: VmType | undefined;
  /** Bytes of guest memory. */
  readonly memory: number;
}

export type Command =
  | { readonly name: 'help'; readonly topic: Topic | undefined }
  | { readonly name: 'version' }
  | { readonly name: 'probe'; readonly options: Common }
  | { readonly name: 'demo'; readonly options: DemoOptions };

const backends: readonly ('auto' | BackendName)[] = ['auto', 'kvm', 'software'];
const arches: readonly Arch[] = ['x86_64', 'aarch64'];
const topics: readonly Topic[] = ['probe', 'demo'];
const MEMORY = { least: 8 * MiB, most: 256 * GiB, usual: 4 * GiB, step: MiB };

const common = {
  backend: { type: 'string' },
  device: { type: 'string' },
  kernel: { type: 'string' },
  arch: { type: 'string' },
  json: { type: 'boolean', default: false },
  help: { type: 'boolean', short: 'h', default: false },
} as const;

/** @throws UsageError */
export function parseCommand(argv: readonly string[]): Command {
  const [first, ...rest] = argv;
  if (first === undefined || first === '--help' || first === '-h') return { name: 'help', topic: undefined };
  if (first === '--version' || first === '-V') return { name: 'version' };
  if (first === 'help') return { name: 'help', topic: rest[0] === undefined ? undefined : topic(rest[0]) };
  if (first.startsWith('-')) throw new UsageError(`unknown option '${first}' before a command`);
  return topic(first) === 'probe' ? parseProbe(rest) : parseDemo(rest);
}

function parseProbe(argv: readonly string[]): Command {
  const values = strictly('probe', () => parseArgs({ args: [...argv], options: common }).values);
  return values.help
    ? { name: 'help', topic: 'probe' }
    : { name: 'probe', options: { open: openOptions('probe', values), json: values.json } };
}

function parseDemo(argv: readonly string[]): Command {
  const options = { ...common, type: { type: 'string' }, memory: { type: 'string' } } as const;
  const values = strictly('demo', () => parseArgs({ args: [...argv], options }).values);
  if (values.help) return { name: 'help', topic: 'demo' };
  const memory = values.memory === undefined ? MEMORY.usual : parseSize(values.memory);
  const type = values.type === undefined ? undefined : oneOf('demo', 'type', values.type, vmTypeNames);
  return {
    name: 'demo',
    options: { open: openOptions('demo', values), json: values.json, type, memory },
  };
}

function openOptions(
  topic: Topic,
  given: { backend?: string; device?: string; kernel?: string; arch?: string },
): OpenOptions {
  const model = {
    ...(given.kernel === undefined
      ? {}
      : { kernel: oneOf<KernelVersion>(topic, 'kernel', given.kernel, kernelVersions) }),
    ...(given.arch === undefined ? {} : { arch: oneOf(topic, 'arch', given.arch, arches) }),
  };
  const modelled = Object.keys(model).length > 0;
  // Who names a kernel to play means the one that can play it.
  const backend = oneOf(topic, 'backend', given.backend ?? (modelled ? 'software' : 'auto'), backends);
  if (modelled && backend !== 'software')
    throw new UsageError(
      `--kernel and --arch choose what the software kernel plays, not '--backend ${backend}'`,
      topic,
    );
  if (given.device === '') throw new UsageError('--device needs a path', topic);
  return { backend, model, ...(given.device === undefined ? {} : { device: given.device }) };
}

/** '8G', '512M', '4GiB' */
function parseSize(text: string): number {
  const [, digits = '', unit = ''] = /^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$/i.exec(text) ?? [];
  const scale = { '': 1, K: KiB, M: MiB, G: GiB, T: TiB }[unit.toUpperCase()] ?? 1;
  const bytes = digits === '' ? Number.NaN : Number(digits) * scale;
  if (!(bytes >= MEMORY.least && bytes <= MEMORY.most && bytes % MEMORY.step === 0))
    throw new UsageError(`--memory takes whole MiB from 8M to 256G, like 512M or 8G; not '${text}'`, 'demo');
  return bytes;
}

function topic(word: string): Topic {
  const found = topics.find((one) => one === word);
  if (found === undefined) throw new UsageError(`unknown command '${word}'; there are probe, demo and help`);
  return found;
}

function oneOf<T extends string>(topic: Topic, option: string, value: string, allowed: readonly T[]): T {
  const found = allowed.find((one) => one === value);
  if (found === undefined) throw new UsageError(`--${option} is one of ${allowed.join(', ')}; not '${value}'`, topic);
  return found;
}

/** Node's messages are right, and their first sentence says it. */
function strictly<T>(topic: Topic, parse: () => T): T {
  try {
    return parse();
  } catch (error) {
    const { code = '', message } = error as NodeJS.ErrnoException;
    if (!code.startsWith('ERR_PARSE_ARGS')) throw error;
    const [sentence = ''] = message.split(/\.? To |\. |\n/);
    throw new UsageError(`${sentence.charAt(0).toLowerCase()}${sentence.slice(1).replace(/\.$/, '')}`, topic);
  }
}
