export type { Arch, KernelVersion, ModelOptions, Proposal } from '../model_options.ts';
export type { ReadonlyRangeMap } from '../ranges.ts';
export * as uapi from '../uapi.ts';
export * as proposedUapi from '../uapi_proposed.ts';
export type {
  CacheStatus,
  DeviceAttr,
  FileStatus,
  Kernel,
  MemoryAttributes2Args,
  MemoryAttributesArgs,
  Result,
  U64,
  UserMemoryRegion,
  UserMemoryRegion2,
} from './kernel.ts';
export { linuxKernel } from './linux/linux_kernel.ts';
export { softwareKernel } from './software/index.ts';
