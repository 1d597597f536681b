import { AGENT_SIZE } from '../agent/protocol.ts';
import {
  type ConversionReport,
  type FileRange,
  GiB,
  GuestAgent,
  type GuestMemfd,
  type GuestRange,
  type HostMemory,
  KiB,
  KvmError,
  MiB,
  type Vm,
} from '../index.ts';
import { amount, code, place } from './text.ts';

/** One act: what is done, and what came of it. */
export interface Step {
  /** Stable; for programs. */
  readonly id: string;
  readonly title: string;
  /** The calls, as a program would write them. */
  readonly calls: readonly string[];
  readonly outcome: readonly string[];
  /** Bytes and addresses, by name. */
  readonly numbers: Readonly<Record<string, number>>;
  /** The error a call was meant to meet. */
  readonly refusal: { readonly code: string; readonly message: string } | null;
}

/** Where the RAM is: below the hole that PCs keep for devices, and from 4 GiB on. */
export interface Layout {
  readonly low: GuestRange;
  readonly high: GuestRange;
  /** What the acts measure in, a power of two: 64 MiB for a guest of 4 GiB or more. */
  readonly unit: number;
}

const GREETING = 0x1000;
/** The answer of the guest, in the same page. */
const ANSWER = 0x1800;
/** Where the guest's code lives: no act converts or discards it. */
const AGENT = 64 * KiB;
const HIGH = 4 * GiB;
const LOW_MAX = 3 * GiB;

export function layout(memory: number): Layout {
  const low = Math.min(LOW_MAX, Math.floor((memory * 3) / 4 / MiB) * MiB);
  return {
    low: { address: 0, size: low },
    high: { address: HIGH, size: memory - low },
    unit: 2 ** Math.floor(Math.log2(low / 48)),
  };
}

/** A guest whose memory has two sides: host memory for what is shared, a guest_memfd for what is private. */
export async function* privateTour(vm: Vm, { low, high, unit }: Layout): AsyncGenerator<Step> {
  const total = low.size + high.size;
  using ram = vm.kvm.createHostMemory({ size: total });
  using file = vm.createGuestMemfd({ size: total });
  vm.createMemslot({ ...low, hostMemory: ram, guestMemfd: file });
  vm.createMemslot({ ...high, hostMemory: ram, hostOffset: low.size, guestMemfd: file, guestMemfdOffset: low.size });
  yield step('create', 'Two regions of RAM on one guest_memfd', {
    calls: [
      `kvm.createHostMemory({ size: ${code(total)} })  // the shared side`,
      `vm.createGuestMemfd({ size: ${code(total)} })   // the private side`,
      `vm.createMemslot({ address: 0, size: ${code(low.size)}, … })`,
      `vm.createMemslot({ address: 4 * GiB, guestMemfdOffset: ${code(low.size)}, … })`,
    ],
    outcome: [`${amount(total)} of guest memory, and it costs nothing yet`],
    numbers: { memory: total },
  });

  const image = { address: 8 * unit, size: unit / 2 };
  yield hostAccess(vm, image);
  const guest = bootGuest(vm);
  using agent = guest.agent;
  yield guest.step;
  yield refused('hole', 'What no memslot backs is refused', `vm.memory.read(${code(low.size)} - 4, 8)`, () =>
    vm.memory.read(low.size - 4, 8),
  );

  const below = { address: 8 * unit, size: 16 * unit };
  const toPrivate = await vm.convert(below, 'private');
  yield conversion('convert-private', `Make ${amount(below.size)} private`, below, toPrivate, [
    'the host’s copy of these pages is gone: no byte is held twice',
  ]);

  const above = { address: HIGH + 2 * unit, size: 8 * unit };
  const toPrivateAbove = await vm.convert(above, 'private');
  yield conversion('convert-private-above', 'The same above 4 GiB', above, toPrivateAbove);

  const written = { address: 11 * unit, size: 2 * unit };
  const writtenAbove = { address: HIGH + 4 * unit, size: unit / 2 };
  const inFile = { offset: low.size + 4 * unit, size: writtenAbove.size };
  yield guestWrites(agent, file, written, writtenAbove, inFile);

  yield refused('private-read', 'The host cannot read it', `vm.memory.read(${code(written.address)}, 16)`, () =>
    vm.memory.read(written.address, 16),
  );

  const part = { address: 8 * unit, size: 4 * unit };
  const toShared = await vm.convert(part, 'shared');
  const heldBefore = ram.residentBytes();
  const zeros = vm.memory.read(image.address, 16).every((byte) => byte === 0);
  const touched = ram.residentBytes() - heldBefore;
  yield conversion('convert-shared', 'Give a part back to the host', part, toShared, [
    `the host reads ${zeros ? 'zeros' : 'data'} there: nothing private comes out${made(touched)}`,
  ]);

  const again = await vm.convert(below, 'private');
  yield conversion('convert-again', 'Make all of it private again', below, again);

  const before = file.residentBytes();
  file.punchHole(inFile);
  const freed = before - file.residentBytes();
  yield step('punch-hole', 'Punch a hole into the private memory', {
    calls: [`file.punchHole({ offset: ${code(low.size)} + ${code(4 * unit)}, size: ${code(inFile.size)} })`],
    outcome: [
      `${amount(freed)} given back; it is still private`,
      `offset ${place(inFile.offset)} of the file is guest address ${place(writtenAbove.address)}: ${guestLooks(agent, writtenAbove.address, file)}`,
    ],
    numbers: { freedBytes: freed },
  });
}

/** A guest without private memory: the host and the guest see the same pages, of a guest_memfd where the kernel can share one. */
export async function* sharedTour(vm: Vm, { low, high, unit }: Layout): AsyncGenerator<Step> {
  const total = low.size + high.size;
  const mappable = vm.capabilities.guestMemfdInitShared;
  using file = mappable ? vm.createGuestMemfd({ size: total, mmap: true, initShared: true }) : null;
  using ram = mappable ? null : vm.kvm.createHostMemory({ size: total });
  for (const [region, offset] of [[low, 0] as const, [high, low.size] as const]) {
    if (file) vm.createMemslot({ ...region, guestMemfd: file, guestMemfdOffset: offset });
    if (ram) vm.createMemslot({ ...region, hostMemory: ram, hostOffset: offset });
  }
  const [create, offset] = mappable
    ? [`vm.createGuestMemfd({ size: ${code(total)}, mmap: true, initShared: true })`, 'guestMemfdOffset']
    : [`kvm.createHostMemory({ size: ${code(total)} })`, 'hostOffset'];
  yield step('create', `Two regions of RAM on one ${mappable ? 'guest_memfd' : 'piece of host memory'}`, {
    calls: [
      create,
      `vm.createMemslot({ address: 0, size: ${code(low.size)}, … })`,
      `vm.createMemslot({ address: 4 * GiB, ${offset}: ${code(low.size)}, … })`,
    ],
    outcome: [
      `${amount(total)} of guest memory, and it costs nothing yet`,
      ...(mappable ? [] : ['(this kernel has no guest_memfd the host can map: Linux 6.18)']),
    ],
    numbers: { memory: total },
  });

  const image = { address: 8 * unit, size: unit / 2 };
  yield hostAccess(vm, image);
  const guest = bootGuest(vm);
  using agent = guest.agent;
  yield guest.step;
  yield refused('hole', 'What no memslot backs is refused', `vm.memory.read(${code(low.size)} - 4, 8)`, () =>
    vm.memory.read(low.size - 4, 8),
  );

  const memory = file ?? ram;
  const hole = { offset: image.address, size: image.size };
  const before = memory?.residentBytes() ?? 0;
  if (file) file.punchHole(hole);
  else ram?.discard(hole);
  const freed = before - (memory?.residentBytes() ?? 0);
  yield step('punch-hole', 'Punch a hole where the image was', {
    calls: [`${file ? 'file.punchHole' : 'ram.discard'}({ offset: ${code(hole.offset)}, size: ${code(hole.size)} })`],
    outcome: [`${amount(freed)} given back to the host`, guestLooks(agent, image.address, memory)],
    numbers: { freedBytes: freed },
  });

  const range = { address: 8 * unit, size: 16 * unit };
  const call = `vm.convert({ address: ${code(range.address)}, size: ${code(range.size)} }, 'private')`;
  yield refused('convert-private', 'Private memory is refused here', call, () => vm.convertSync(range, 'private'));
}

function hostAccess(vm: Vm, image: GuestRange): Step {
  const texts = [
    [GREETING, 'hello below'],
    [HIGH + GREETING, 'hello above'],
  ] as const;
  vm.memory.write(image.address, new Uint8Array(image.size).fill(0x90));
  for (const [address, text] of texts) vm.memory.write(address, Buffer.from(text));
  const read = texts.map(([address, text]) => Buffer.from(vm.memory.read(address, text.length)).toString());
  return step('host-access', 'The host writes and reads by guest address', {
    calls: [
      `vm.memory.write(${code(image.address)}, image)  // ${amount(image.size)}`,
      ...texts.map(([address, text]) => `vm.memory.write(${address < HIGH ? '' : '4 * GiB + '}0x1000, '${text}')`),
    ],
    outcome: [`reads back '${read.join("' and '")}'`],
    numbers: { writtenBytes: image.size + texts.reduce((sum, [, text]) => sum + text.length, 0) },
  });
}

/** A vCPU does what the host just did, in the same memory. */
function bootGuest(vm: Vm): { readonly agent: GuestAgent | null; readonly step: Step } {
  const id = 'guest-access';
  const boot = `agent = GuestAgent.boot(vm, { address: ${code(AGENT)} })`;
  let agent: GuestAgent;
  try {
    agent = GuestAgent.boot(vm, { address: AGENT });
  } catch (error) {
    if (!(error instanceof KvmError)) throw error;
    const { code, message } = error;
    return {
      agent: null,
      step: { ...step(id, 'No vCPU runs in this VM', { calls: [boot] }), refusal: { code, message } },
    };
  }
  const name = `vCPU ${agent.vcpu.id}`;
  const [below, above] = [`${name} below`, `${name} above`];
  const heard = [GREETING, HIGH + GREETING].map((at) => Buffer.from(agent.read(at, 11)).toString());
  agent.write(ANSWER, Buffer.from(below));
  agent.write(HIGH + ANSWER, Buffer.from(above));
  const answers = [ANSWER, HIGH + ANSWER].map((at) => Buffer.from(vm.memory.read(at, below.length)).toString());
  return {
    agent,
    step: step(id, `A vCPU reads and writes the same memory`, {
      calls: [
        `${boot}  // runs ${name}`,
        `agent.read(0x1000, 11), agent.read(4 * GiB + 0x1000, 11)`,
        `agent.write(0x1800, '${below}')`,
        `agent.write(4 * GiB + 0x1800, '${above}')`,
      ],
      outcome: [
        `${name} reads '${heard.join("' and '")}'`,
        `the host reads '${answers.join("' and '")}'`,
        `${amount(AGENT_SIZE)} more are held: the code that ${name} runs, and its page tables`,
      ],
      numbers: { vcpu: agent.vcpu.id, agentBytes: AGENT_SIZE, writtenBytes: below.length + above.length },
    }),
  };
}

function guestWrites(
  agent: GuestAgent | null,
  file: GuestMemfd,
  below: GuestRange,
  above: GuestRange,
  inFile: FileRange,
): Step {
  const [id, title] = ['guest-writes', 'The guest fills some of its private memory'];
  const start = `4 * GiB + ${code(above.address - HIGH)}`;
  const heldBefore = file.residentBytes();
  if (!agent) {
    // Both regions are on one file, the lower one from its start.
    file.allocate({ offset: below.address, size: below.size });
    file.allocate(inFile);
    return step(id, title, {
      calls: [
        `file.allocate({ offset: ${code(below.address)}, size: ${code(below.size)} })`,
        `file.allocate({ offset: ${code(inFile.offset)}, size: ${code(inFile.size)} })`,
      ],
      outcome: ['no vCPU runs in this VM: pages allocated for the guest stand in for its writes'],
      numbers: { allocatedBytes: file.residentBytes() - heldBefore },
    });
  }
  for (const range of [below, above]) agent.fill(range, 0x5a);
  const [last] = agent.read(above.address + above.size - 1, 1);
  return step(id, title, {
    calls: [
      `agent.fill({ address: ${code(below.address)}, size: ${code(below.size)} }, 0x5a)`,
      `agent.fill({ address: ${start}, size: ${code(above.size)} }, 0x5a)`,
    ],
    outcome: [
      `vCPU ${agent.vcpu.id} wrote ${amount(below.size + above.size)}, and reads 0x${last?.toString(16)} there`,
    ],
    numbers: { vcpu: agent.vcpu.id, allocatedBytes: file.residentBytes() - heldBefore },
  });
}

/** What the guest sees where a hole was punched. */
function guestLooks(agent: GuestAgent | null, address: number, memory: GuestMemfd | HostMemory | null): string {
  if (!agent) return 'the guest would read zeros';
  const before = memory?.residentBytes() ?? 0;
  const zeros = agent.read(address, 16).every((byte) => byte === 0);
  const touched = (memory?.residentBytes() ?? 0) - before;
  return `vCPU ${agent.vcpu.id} reads ${zeros ? 'zeros' : 'data'} there${made(touched)}`;
}

function made(bytes: number): string {
  return bytes > 0 ? ` (looking made a page of ${amount(bytes)})` : '';
}

function conversion(
  id: string,
  title: string,
  { address, size }: GuestRange,
  { to, changed, unchanged, freedBytes }: ConversionReport,
  more: readonly string[] = [],
): Step {
  const [changedBytes, unchangedBytes] = [changed, unchanged].map((ranges) =>
    ranges.reduce((sum, range) => sum + range.size, 0),
  ) as [number, number];
  const start = address < HIGH ? code(address) : `4 * GiB + ${code(address - HIGH)}`;
  return step(id, title, {
    calls: [`vm.convert({ address: ${start}, size: ${code(size)} }, '${to}')`],
    outcome: [
      `${amount(changedBytes)} changed${unchangedBytes > 0 ? `, ${amount(unchangedBytes)} were ${to} already` : ''}; ${freedBytes > 0 ? `${amount(freedBytes)} given back to the host` : 'nothing was held there'}`,
      ...more,
    ],
    numbers: { address, size, changedBytes, unchangedBytes, freedBytes },
  });
}

/** A call that must fail, and how it does. */
function refused(id: string, title: string, call: string, attempt: () => unknown): Step {
  try {
    attempt();
  } catch (error) {
    if (!(error instanceof KvmError)) throw error;
    const { code, message } = error;
    return { ...step(id, title, { calls: [call] }), refusal: { code, message } };
  }
  throw new Error(`${call} should have been refused`);
}

function step(id: string, title: string, rest: Pick<Step, 'calls'> & Partial<Step>): Step {
  return { id, title, outcome: [], numbers: {}, refusal: null, ...rest };
}
