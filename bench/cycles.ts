// What is left of VMs that came and went: file descriptors, mappings, memory.
import { readdirSync, readFileSync } from 'node:fs';
import { setImmediate } from 'node:timers/promises';
import { type BackendName, Kvm, MiB } from '../lib/index.ts';
import type { Result, Row } from './measure.ts';

/** With --full, for both; by default what takes some seconds. */
const FULL = 100_000;
const COUNT: Record<BackendName, number> = { kvm: 5000, software: 10_000 };
/** Before and after: the heap breathes by more than a leak would add, so what is held is looked at more than once. */
const PARTS = { count: 5, cycles: 800 };

interface Held {
  readonly fds: number;
  readonly mappings: number;
  readonly mebibytes: number;
}

export async function benchCycles(full: boolean): Promise<Result[]> {
  const results: Result[] = [];
  for (const backend of ['software', 'kvm'] as const) {
    try {
      results.push(...(await measure(backend, full ? FULL : COUNT[backend])));
    } catch (error) {
      results.push({ name: `cycles, ${backend}`, skipped: (error as Error).message.split('\n')[0] ?? '' });
    }
  }
  return results;
}

async function measure(backend: BackendName, count: number): Promise<Row[]> {
  const kvm = Kvm.open({ backend });
  const early = await inParts(kvm);
  const start = performance.now();
  await repeat(kvm, count);
  const time = (performance.now() - start) / count;
  const late = await inParts(kvm);
  kvm.close();
  const name = `${backend}, ${count.toLocaleString('en').replaceAll(',', ' ')} cycles`;
  const growth = (what: keyof Held): number => {
    return Math.max(0, Math.min(...late.map((one) => one[what])) - Math.max(...early.map((one) => one[what])));
  };
  return [
    { name: `${name}: time of one`, value: time * 1000, unit: 'µs' },
    { name: `${name}: fds left`, value: growth('fds'), unit: '', bar: 0 },
    // The heap takes and gives mappings as it likes; a leak would be one for every cycle.
    { name: `${name}: mappings left`, value: growth('mappings'), unit: '', bar: count / 100 },
    { name: `${name}: memory left`, value: growth('mebibytes'), unit: 'MiB', bar: 16 },
  ];
}

async function inParts(kvm: Kvm): Promise<Held[]> {
  const seen: Held[] = [];
  for (let part = 0; part < PARTS.count; part++) {
    await repeat(kvm, PARTS.cycles);
    seen.push(await held());
  }
  return seen;
}

async function repeat(kvm: Kvm, count: number): Promise<void> {
  for (let i = 0; i < count; i++) {
    cycle(kvm);
    // Finalizers of windows run between turns of the event loop.
    if (i % 100 === 0) await setImmediate();
  }
}

/** VM, guest_memfd, host memory, slot and window, closed by their owners. */
function cycle(kvm: Kvm): void {
  const vm = kvm.createVm();
  const { guestMemfdMmap: mmap, guestMemfdInitShared } = vm.capabilities;
  const initShared = mmap && guestMemfdInitShared;
  const guestMemfd = vm.createGuestMemfd({ size: MiB, mmap: initShared, initShared });
  const hostMemory = kvm.createHostMemory({ size: MiB });
  vm.createMemslot({ address: 0, size: MiB, guestMemfd });
  vm.createMemslot({ address: MiB, size: MiB, hostMemory });
  hostMemory.bytes()[0] = 1;
  if (initShared) guestMemfd.bytes()[0] = 1;
  vm.close();
  hostMemory.close();
}

async function held(): Promise<Held> {
  for (let i = 0; i < 5; i++) {
    globalThis.gc?.();
    await setImmediate();
  }
  return {
    fds: readdirSync('/proc/self/fd').length,
    mappings: readFileSync('/proc/self/maps', 'utf8').split('\n').length - 1,
    mebibytes: process.memoryUsage.rss() / 2 ** 20,
  };
}
