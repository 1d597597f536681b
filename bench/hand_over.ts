// A hand-over: how long the guest stands still, for memory that was touched more and less. Its files change hands, so neither the size nor what was touched
// may matter. A host without hardware paging keeps gigabytes for a memslot of 1 TiB, so KVM has less.
import { GiB, handOver, Kvm, KvmError, MiB, takeOver } from '../lib/index.ts';
import { quantile, type Result } from './measure.ts';

const ROUNDS = 5;

async function pause(backend: 'kvm' | 'software', size: number, touched: number): Promise<number> {
  using kvm = Kvm.open({ backend });
  using successor = Kvm.open({ backend });
  using vm = kvm.createVm();
  vm.createMemslot({ address: 0, size, hostMemory: kvm.createHostMemory({ size, kind: 'memfd' }) });
  const content = new Uint8Array(MiB).fill(1);
  for (let at = 0; at < touched; at += MiB) vm.memory.write(at, content);
  const times: number[] = [];
  let from = vm;
  let to = successor;
  for (let round = 0; round < ROUNDS; round++) {
    const path = `@guest-memfd-bench-${process.pid}-${round}`;
    const [report, taken] = await Promise.all([handOver(from, { path }), takeOver(to, { path })]);
    times.push(report.pausedMilliseconds);
    from.close();
    from = taken.vm;
    to = to === kvm ? successor : kvm;
  }
  return quantile(times, 0.5);
}

export async function benchHandOver(): Promise<Result[]> {
  const results: Result[] = [];
  for (const [backend, size] of [
    ['software', 1024 * GiB],
    ['kvm', 16 * GiB],
  ] as const) {
    try {
      for (const touched of [64 * MiB, 256 * MiB, GiB])
        results.push({
          name: `${backend}: ${size / GiB} GiB, of which ${touched / MiB} MiB were touched: paused`,
          value: await pause(backend, size, touched),
          unit: 'ms',
          bar: 50,
        });
    } catch (error) {
      if (!(error instanceof KvmError) || backend === 'software') throw error;
      results.push({ name: backend, skipped: error.message });
    }
  }
  return results;
}
