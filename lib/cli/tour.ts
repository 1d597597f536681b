import { type ConversionReport, GiB, type GuestRange, KvmError, MiB, type Vm } from '../index.ts';
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

  const written = { offset: 11 * unit, size: 2 * unit };
  const writtenAbove = { offset: low.size + 4 * unit, size: unit / 2 };
  file.allocate(written);
  file.allocate(writtenAbove);
  yield step('guest-writes', 'The guest fills some of its private memory', {
    calls: [
      `file.allocate({ offset: ${code(written.offset)}, size: ${code(written.size)} })`,
      `file.allocate({ offset: ${code(low.size)} + ${code(4 * unit)}, size: ${code(writtenAbove.size)} })`,
    ],
    outcome: ['nobody runs this guest: pages allocated for it stand in for its writes'],
    numbers: { allocatedBytes: written.size + writtenAbove.size },
  });

  yield refused('private-read', 'The host cannot read it', `vm.memory.read(${code(written.offset)}, 16)`, () =>
    vm.memory.read(written.offset, 16),
  );

  const part = { address: 8 * unit, size: 4 * unit };
  const toShared = await vm.convert(part, 'shared');
  const heldBefore = ram.residentBytes();
  const zeros = vm.memory.read(image.address, 16).every((byte) => byte === 0);
  const touched = ram.residentBytes() - heldBefore;
  yield conversion('convert-shared', 'Give a part back to the host', part, toShared, [
    `the host reads ${zeros ? 'zeros' : 'data'} there: nothing private comes out${touched > 0 ? ` (looking made a page of ${amount(touched)})` : ''}`,
  ]);

  const again = await vm.convert(below, 'private');
  yield conversion('convert-again', 'Make all of it private again', below, again);

  const before = file.residentBytes();
  file.punchHole(writtenAbove);
  const freed = before - file.residentBytes();
  yield step('punch-hole', 'Punch a hole into the private memory', {
    calls: [`file.punchHole({ offset: ${code(low.size)} + ${code(4 * unit)}, size: ${code(writtenAbove.size)} })`],
    outcome: [
      `${amount(freed)} given back; still private, and zeros when the guest looks`,
      `offset ${place(writtenAbove.offset)} of the file is guest address ${place(HIGH + 4 * unit)}`,
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
    outcome: [`${amount(freed)} given back to the host; the guest would read zeros`],
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
