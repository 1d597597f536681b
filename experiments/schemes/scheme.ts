import { type GuestAgent, Kvm, MiB } from 'guest-memfd';
import { linuxKernel } from '../../lib/kernel/linux/linux_kernel.ts';
import { softwareKernel } from '../../lib/kernel/software/index.ts';
import { internal } from '../../lib/resource.ts';
import { openWithPrivate } from '../common.ts';
import type { ExperimentOptions } from '../experiment.ts';
import type { Meter } from '../meter.ts';

export type Backend = ExperimentOptions['backend'];

/** The largest request, and what a guest has of data: requests take turns in it, so that each finds what the one before has left. */
export const AREA = MiB;
export const AREAS = 2;
/** Guest physical: the agent and what it shares with the host from 0 on, the data here. */
export const HOME = MiB;
export const DATA = 4 * MiB;

export interface Request {
  readonly area: number;
  readonly size: number;
}

/** Called by the host with bytes of the request, from its first on, where the device finds them. */
export type Device = (bytes: Uint8Array, offset: number) => void;

/** A guest and a host that hand requests over in one way. */
export interface Session extends Disposable {
  /** What it runs on. */
  readonly host: string;
  /** Whether that is a real CPU, so that time means something. */
  readonly real: boolean;
  request(request: Request, device: Device): void;
}

export interface Scheme {
  readonly key: string;
  readonly name: string;
  /** The proposed interfaces it needs, or none. */
  readonly needs: string;
  open(meter: Meter, backend: Backend, data: Uint8Array): Session;
}

/** KVM behind a meter. */
export function metered(meter: Meter, backend: Backend, needsPrivate: boolean): Kvm {
  using found = needsPrivate ? openWithPrivate(backend) : Kvm.open({ backend });
  const kernel = meter.watch(found.backend === 'kvm' ? linuxKernel() : softwareKernel());
  return new Kvm(internal, kernel, kernel.openKvm(), null);
}

export function hostOf(kvm: Kvm): string {
  return kvm.backend === 'kvm' ? `Linux ${kvm.kernelRelease}` : `the model of Linux ${kvm.kernelRelease}`;
}

/** Parts of at most `size` bytes. */
export function* pieces(length: number, size: number): Generator<{ readonly offset: number; readonly size: number }> {
  for (let offset = 0; offset < length; offset += size) yield { offset, size: Math.min(size, length - offset) };
}

/** The pages a request lies on. */
export function pagesOf(
  { area, size }: Request,
  pageSize: number,
): { readonly address: number; readonly size: number } {
  return { address: DATA + area * AREA, size: Math.ceil(size / pageSize) * pageSize };
}

/** The guest asks; after the answer it goes on, which `notifies` says is a notification to the device. */
export function ask(
  agent: GuestAgent,
  meter: Meter,
  range: { readonly address: number; readonly size: number },
  { to, notifies }: { readonly to: 'private' | 'shared'; readonly notifies: boolean },
): void {
  const answer = agent.requestConversion(range, to);
  if (answer !== 0n) throw new Error(`the guest's request was answered with ${answer}`);
  meter.hypercall();
  if (!notifies) meter.scripted();
}
