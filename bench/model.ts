// What the software kernel promises at the scale of a large guest, and what a call of it costs.
import { GiB, TiB } from '../lib/index.ts';
import { softwareKernel, uapi } from '../lib/kernel/index.ts';
import { MemoryAttributes } from '../lib/memory_attributes.ts';
import { internal } from '../lib/resource.ts';
import { quantile, type Result, timed } from './measure.ts';

const PAGE = 4096;
const SPACE = 16 * TiB;
const MILLION = 1_000_000;
const SW_PROTECTED = 1;
const PRIVATE = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE;
const PUNCH = uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE;
const SLOT_SIZE = 1 << 20;

function protectedVm() {
  const kernel = softwareKernel();
  const vm = kernel.createVm(kernel.openKvm(), SW_PROTECTED);
  return { kernel, vm };
}

function randomPages(limit: number): number {
  return Math.floor(Math.random() * limit);
}

/** In a process of its own: the memory is that of this one alone. */
export function benchConversions(): Result[] {
  const { kernel, vm } = protectedVm();
  globalThis.gc?.();
  const before = process.memoryUsage.rss();
  const start = performance.now();
  for (let i = 0; i < MILLION; i++) {
    const pages = 1 + randomPages(GiB / PAGE);
    const address = randomPages(SPACE / PAGE - pages) * PAGE;
    const attributes = i % 2 ? 0 : PRIVATE;
    must(kernel.setMemoryAttributes(vm, { address, size: pages * PAGE, attributes, flags: 0 }));
  }
  const seconds = (performance.now() - start) / 1000;
  const growth = (process.resourceUsage().maxRSS * 1024 - before) / 2 ** 20;
  const name = '1 000 000 conversions of 4 KiB to 1 GiB over 16 TiB';
  return [
    { name, value: seconds, unit: 's', bar: 3 },
    { name: `${name}: memory, at most`, value: growth, unit: 'MiB', bar: 300 },
  ];
}

export function benchModel(): Result[] {
  return [...fragmented(), ...singleCalls()];
}

/** A VM whose every other page is private. */
function fragmented(): Result[] {
  const { kernel, vm } = protectedVm();
  const stride = SPACE / MILLION - ((SPACE / MILLION) % PAGE);
  const build = performance.now();
  for (let i = 0; i < MILLION; i++) {
    must(kernel.setMemoryAttributes(vm, { address: i * stride, size: PAGE, attributes: PRIVATE, flags: 0 }));
  }
  const built = (performance.now() - build) / 1000;
  const gfns = kernel.privateGfns(vm);
  if (gfns?.size !== MILLION) throw new Error('there must be a million ranges');
  const attributes = new MemoryAttributes(internal, () => gfns, PAGE);

  const whole = { address: 0, size: SPACE };
  const state = (calls: number): void => {
    for (let i = 0; i < calls; i++) if (attributes.state(whole) !== 'mixed') throw new Error('it must be mixed');
  };
  const at = (calls: number): void => {
    for (let i = 0; i < calls; i++) attributes.at(randomPages(SPACE / PAGE) * PAGE);
  };
  const toggle = (calls: number): void => {
    for (let i = 0; i < calls; i++) {
      const address = randomPages(MILLION) * stride;
      must(kernel.setMemoryAttributes(vm, { address, size: PAGE, attributes: i % 2 ? PRIVATE : 0, flags: 0 }));
    }
  };
  return [
    { name: '1 000 000 private ranges, one by one', value: built, unit: 's' },
    { name: 'state() of 16 TiB in 1 000 000 ranges', value: typical(state, 1000) / 1000, unit: 'µs', bar: 1000 },
    { name: 'at() in 1 000 000 ranges', value: typical(at, 20_000) / 1000, unit: 'µs' },
    { name: 'set attributes of 4 KiB in 1 000 000 ranges', value: typical(toggle, 20_000) / 1000, unit: 'µs' },
  ];
}

function singleCalls(): Result[] {
  const { kernel, vm } = protectedVm();
  const file = kernel.createGuestMemfd(vm, { size: SLOT_SIZE, flags: 0 });
  const plain = { slot: 0, flags: 0, guestPhysAddr: 0, memorySize: SLOT_SIZE, userspaceAddr: 1 << 20 };
  const none = { ...plain, memorySize: 0 };
  const bound = { ...plain, flags: uapi.KVM_MEM_GUEST_MEMFD, guestMemfdOffset: 0, guestMemfd: file };
  const calls: Record<string, (calls: number) => void> = {
    'check extension': (calls) => {
      for (let i = 0; i < calls; i++) must(kernel.checkExtension(vm, uapi.KVM_CAP.GUEST_MEMFD));
    },
    'set attributes of 4 KiB': (calls) => {
      for (let i = 0; i < calls; i++) {
        must(kernel.setMemoryAttributes(vm, { address: 0, size: PAGE, attributes: i % 2 ? 0 : PRIVATE, flags: 0 }));
      }
    },
    'punch 4 KiB (empty)': (calls) => {
      for (let i = 0; i < calls; i++) must(kernel.fallocate(file, PUNCH, 0, PAGE));
    },
    'allocate + punch 4 KiB': (calls) => {
      for (let i = 0; i < calls; i++) {
        must(kernel.fallocate(file, uapi.FALLOC_FL_KEEP_SIZE, 0, PAGE));
        must(kernel.fallocate(file, PUNCH, 0, PAGE));
      }
    },
    'add + delete a slot, plain': (calls) => {
      for (let i = 0; i < calls; i++) {
        must(kernel.setUserMemoryRegion(vm, plain));
        must(kernel.setUserMemoryRegion(vm, none));
      }
    },
    'add + delete a slot, guest_memfd': (calls) => {
      for (let i = 0; i < calls; i++) {
        must(kernel.setUserMemoryRegion2(vm, bound));
        must(kernel.setUserMemoryRegion(vm, none));
      }
    },
  };
  return Object.entries(calls).map(([name, loop]) => ({ name, value: typical(loop, 5000) / 1000, unit: 'µs' }));
}

/** Nanoseconds per call: the median of several rounds. */
function typical(loop: (calls: number) => void, calls: number): number {
  return quantile(
    Array.from({ length: 11 }, () => timed(loop, calls)),
    0.5,
  );
}

function must(result: number): void {
  if (result < 0) throw new Error(`a measured call failed: ${result}`);
}
